"""The one loop, over an engine that can be made to misbehave."""

import re
import weakref
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.errors import Diverged, FedloraError
from fedlora_mini.federation import METHODS, Request, Server, Update, federate
from fedlora_mini.federation.aggregation import AggregationError, aggregation_error
from fedlora_mini.models import build

STEPS = 2


@pytest.fixture(scope="module")
def base():
    return prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=2)


@pytest.fixture(scope="module")
def setting(base):
    start = trainable(base)
    return start, keys(base, list(start))


class Script:
    """An engine whose clients answer what a function says."""

    def __init__(self, clients, answer):
        self.clients, self.answer, self.requests = clients, answer, []

    def exchange(self, requests: dict[int, Request]) -> list[Update]:
        self.requests.append(requests)
        return [u for u in (self.answer(client, r) for client, r in requests.items()) if u is not None]


def sent(name, keys, round=1):
    method = METHODS[name]
    return {n for n, key in keys.items() if method.shared(key) and method.schedule.moves(key, round, STEPS)}


def run(name, setting, engine, rounds=1, choose=None):
    start, table = setting
    server = Server(S.clone(start))
    everyone = choose or (lambda round: engine.clients)
    return server, list(federate(METHODS[name], engine, server, table, rounds, STEPS, everyone))


def constant(value, setting, name="fedit", weight=1.0):
    start, table = setting
    return lambda client, request: Update(
        client, {n: torch.full_like(start[n], value(client)) for n in sent(name, table, request.round)}, weight, 0.5
    )


def varied(setting, name):
    """Clients that send random numbers of their own, in new memory."""
    start, table = setting

    def answer(client, request):
        rng = torch.Generator().manual_seed(client)
        state = {n: torch.randn(start[n].shape, generator=rng) for n in sent(name, table, request.round)}
        return Update(client, state, 1.0 + client, 0.5)

    return answer


def test_the_server_takes_the_weighted_mean(setting):
    answer = constant(lambda client: float(client), setting)
    server, _ = run(
        "fedit", setting, Script([0, 1, 2], lambda c, r: Update(c, answer(c, r).state, [1.0, 1.0, 2.0][c], 0.5))
    )
    for value in server.state.values():
        assert torch.allclose(value, torch.full_like(value, 1.25))


def test_updates_are_combined_in_the_order_of_clients(setting):
    torch.manual_seed(0)
    start, _ = setting
    noise = {c: {n: torch.randn_like(v) for n, v in start.items()} for c in range(5)}

    def engine(order):
        return Script(order, lambda c, r: Update(c, noise[c], 1.0 + c))

    first, _ = run("fedit", setting, engine([0, 1, 2, 3, 4]))
    second, _ = run("fedit", setting, engine([3, 1, 4, 0, 2]))
    assert S.digest(first.state) == S.digest(second.state)


@pytest.mark.parametrize("flaw", ["nan", "inf", "shape", "name", "dtype", "weight", "infinite weight"])
def test_a_broken_update_is_refused_reported_and_left_out(setting, flaw):
    good = constant(lambda client: 1.0, setting)

    def answer(client, request):
        update = good(client, request)
        if client != 1:
            return update
        name = next(iter(update.state))
        value = update.state[name]
        weight = 1.0
        if flaw in ("nan", "inf"):
            value = value * float(flaw)
        elif flaw == "shape":
            value = value[..., :-1]
        elif flaw == "dtype":
            value = value.double()
        elif "weight" in flaw:
            weight = 0.0 if flaw == "weight" else float("inf")
        broken = {**update.state, name: value}
        if flaw == "name":
            broken["somewhere.else"] = broken.pop(name)
        return Update(client, broken, weight)

    server, [record] = run("fedit", setting, Script([0, 1, 2], answer))
    assert len(record.refused) == 1 and "client 1" in record.refused[0]
    assert all(torch.equal(value, torch.ones_like(value)) for value in server.state.values())


def test_a_client_that_does_not_answer_is_left_out(setting):
    good = constant(lambda client: 1.0, setting)
    server, [record] = run("fedit", setting, Script([0, 1], lambda c, r: good(c, r) if c else None))
    assert record.refused == ["client 0: no answer"]
    assert all(torch.equal(value, torch.ones_like(value)) for value in server.state.values())


class Stream:
    """An engine whose clients answer one by one, and that counts how many answers are still alive."""

    def __init__(self, clients, answer):
        self.clients, self.answer, self.alive, self.most = clients, answer, set(), 0

    def exchange(self, requests):
        for client, request in requests.items():
            update = self.answer(client, request)
            for name, value in update.state.items():
                self.alive.add((client, name))
                weakref.finalize(value, self.alive.discard, (client, name))
            self.most = max(self.most, len({client for client, _ in self.alive}))
            yield update
            del update, value


@pytest.mark.parametrize("name", ["fedit", "ffa", "fedadam", "fedavgm", "iat", "fednova", "hetlora"])
@pytest.mark.parametrize("measured", [False, True])
def test_updates_pass_one_by_one_where_the_rule_is_a_mean(setting, base, name, measured):
    """A round of 40 clients holds the first answer, the one at hand and the one before it; so does the error."""
    start, table = setting
    method, server, engine = METHODS[name], Server(S.clone(start)), Stream(list(range(40)), varied(setting, name))
    private = lambda n: not method.shared(table[n])  # noqa: E731
    meter = (lambda before: AggregationError(base, before, private)) if measured else None
    [record] = federate(method, engine, server, table, 1, STEPS, lambda t: engine.clients, meter=meter)
    assert record.clients == engine.clients and not record.refused
    assert engine.most <= 3
    assert (record.agg_err is not None) == (measured and name != "iat")


def test_an_error_that_is_a_function_of_all_updates_has_them_held(setting, base):
    """And is the one that is measured as they pass."""
    start, table = setting
    whole = lambda before, after, updates: aggregation_error(base, before, after, updates, lambda n: False)  # noqa: E731
    passing = lambda before: AggregationError(base, before, lambda n: False)  # noqa: E731
    errors = []
    for options in ({"agg_err": whole}, {"meter": passing}):
        engine, server = Stream(list(range(5)), varied(setting, "fedit")), Server(S.clone(start))
        [record] = federate(METHODS["fedit"], engine, server, table, 1, STEPS, lambda t: [0, 1, 2, 3, 4], **options)
        errors.append(record.agg_err)
        assert (engine.most == 5) == ("agg_err" in options)
    assert errors[0] == errors[1] > 0


def test_without_a_usable_update_the_run_stops_and_keeps_the_last_good_state(setting):
    start, table = setting
    server = Server(S.clone(start))
    engine = Script([0], constant(lambda client: float("nan"), setting))
    with pytest.raises(FedloraError, match=r"round 1: no usable update.*NaN"):
        list(federate(METHODS["fedit"], engine, server, table, 1, STEPS, lambda round: [0]))
    with pytest.raises(Diverged, match="A smaller --lr often helps"):
        run("fedit", setting, engine)
    assert server.round == 0 and S.digest(server.state) == S.digest(start)


def test_a_note_that_its_work_did_not_declare_is_named_and_no_rate_is_blamed(setting):
    good = constant(lambda client: 1.0, setting)

    def answer(client, request):
        update = good(client, request)
        return replace(update, state=update.state | {"~v": torch.ones(1)})

    for name in ("fedit", "resfim_lora"):
        accepted = ", ".join(METHODS[name].work.messages) or "none"
        told = re.escape(f"note '~v' is not among its work's `messages`; accepted: {accepted}")
        with pytest.raises(FedloraError, match=told) as caught:
            run(name, setting, Script([0], answer))
        assert "--lr" not in str(caught.value)


def test_a_client_is_told_only_what_changed_since_it_last_took_part(setting):
    start, table = setting
    engine = Script([0, 1], constant(lambda client: 1.0, setting, "rolora"))
    _, records = run("rolora", setting, engine, rounds=4, choose=lambda round: [0, 1] if round in (1, 4) else [0])
    told = [{client: set(r.state) for client, r in requests.items()} for requests in engine.requests]
    B, A = sent("rolora", table, 1), sent("rolora", table, 2)
    assert told == [{0: set(), 1: set()}, {0: B}, {0: A}, {0: B, 1: A | B}]
    assert records[1].bytes_down == S.nbytes(S.pick(start, B.__contains__))


@pytest.mark.parametrize("name", ["fedit", "ffa", "fedsa", "inverse_fedsa", "iat", "local"])
def test_bytes_up_follow_the_formulas(setting, name):
    """Methods card 1.4, per layer: r(m+n), mr, rn, mr, IAT mr in the encoder and rn in the decoder, nothing."""
    start, table = setting
    floats = {"A": 0, "B": 0, "A encoder": 0, "B encoder": 0, "A decoder": 0, "B decoder": 0, "head": 0}
    for n, key in table.items():
        if key.region == "head":
            floats["head"] += start[n].numel()
        else:
            floats[key.factor] += start[n].numel()
            floats[f"{key.factor} {key.region}"] += start[n].numel()
    expected = {
        "fedit": floats["A"] + floats["B"] + floats["head"],
        "ffa": floats["B"] + floats["head"],
        "fedsa": floats["A"],
        "inverse_fedsa": floats["B"],
        "iat": floats["B encoder"] + floats["A decoder"] + floats["head"],
        "local": 0,
    }[name]
    engine = Script([0, 1], constant(lambda client: 1.0, setting, name))
    _, [record] = run(name, setting, engine)
    assert record.bytes_up == 2 * 4 * expected


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda out: {"foo": torch.zeros(2)}, "rule 'my_rule' returned no '.*', which travelled; accepted: "),
        (lambda out: out | {"foo": torch.zeros(2)}, "rule 'my_rule' returned 'foo'; accepted: "),
        (lambda out: None, "rule 'my_rule' returned a NoneType"),
        (lambda out: dict.fromkeys(out, 1.0), "rule 'my_rule' returned values that are no tensors"),
        (lambda out: {n: v * float("nan") for n, v in out.items()}, "rule 'my_rule' returned NaN or infinite values"),
        (lambda out: {n: v[..., :1] for n, v in out.items()}, r"rule 'my_rule' returned '.*' as \(.*, expected \("),
        (lambda out: {n: v.double() for n, v in out.items()}, "rule 'my_rule' returned '.*float64, expected .*float32"),
    ],
)
def test_a_rule_that_answers_nonsense_is_named_with_what_it_returned(setting, returned, words):
    start, table = setting

    def my_rule(server, updates):
        return returned(S.weighted_mean((update.state, update.weight) for update in updates))

    engine = Script([0, 1], constant(float, setting))
    row = replace(METHODS["fedit"], rule=my_rule)
    with pytest.raises(FedloraError, match=words):
        next(federate(row, engine, Server(S.clone(start)), table, 1, STEPS, lambda round: engine.clients))


@pytest.mark.parametrize("name", ["flexlora", "flora", "hetlora"])
def test_a_rule_on_pairs_without_pairs_says_what_it_needs(setting, name):
    start, table = setting
    whole = {n: key for n, key in table.items() if key.region == "head"}
    engine = Script([0, 1], lambda client, request: Update(client, {n: start[n] + client for n in whole}, 1.0))
    server = Server({n: start[n].clone() for n in whole})
    rounds = federate(METHODS[name], engine, server, whole, 1, STEPS, lambda round: [0, 1])
    with pytest.raises(FedloraError, match="needs layers that send A and B"):
        next(rounds)
