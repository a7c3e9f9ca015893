"""AS-LoRA: the server draws what moves, clients train and send just that, scores follow the card."""

import math
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import parse_arm
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.federation import METHODS, Budget, Server, Update, federate
from fedlora_mini.federation.aggregation import aggregation_error
from fedlora_mini.federation.aggregation.selection import ROUND, SCORE, Selection, probability
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.schedule import MODE
from fedlora_mini.federation.works.selection import Recorder, Selected, score
from fedlora_mini.losses import task_loss
from fedlora_mini.models import build
from fedlora_mini.privacy import DPSGD
from fedlora_mini.privacy.filters import FILTERS

ROW = METHODS["as_lora"].but(warmup=4)
BUDGET = Budget(steps=2, batch=2, lr=1e-2, optimiser="sgd", augment=False)


def federation(data, row=ROW, guard=None, dtype=torch.float64):
    model = prepare(build("minisam", len(data.classes), d=16, depth=1, stem=4, width=4), row.adapter).to(dtype)
    start = trainable(model)
    splits = [type(site.train)(site.train.images.to(dtype), site.train.masks) for site in data.sites]
    return LocalEngine(model, row, keys(model, list(start)), splits, BUDGET, 0, guard=guard), Server(start)


def advance(engine, server, rounds):
    """The factors of every layer that moved in each round, and the records."""
    moved, records, row = [], [], engine.method
    error = lambda before, after, updates: aggregation_error(  # noqa: E731
        engine.setting.model, before, after, updates, engine.private
    )
    args = (row, engine, server, engine.keys, rounds, BUDGET.steps, lambda t: engine.clients, error)
    before = dict(server.state)
    for record in federate(*args):
        changed = {n for n in engine.keys if not torch.equal(before[n], server.state[n])}
        moved.append({engine.keys[n].path: engine.keys[n].factor for n in changed if engine.keys[n].factor in "AB"})
        before = dict(server.state)
        records.append(record)
    return moved, records


def test_the_warm_up_alternates_and_then_layers_differ(tiny):
    engine, server = federation(tiny)
    moved, records = advance(engine, server, 9)
    layers = {key.path for key in engine.keys.values() if key.factor in "AB"}
    for t, factor in enumerate("BABA"):
        assert moved[t] == dict.fromkeys(layers, factor)
    assert all(each.keys() == layers for each in moved), "one factor of every layer moves in every round"
    assert any(len(set(each.values())) == 2 for each in moved[4:]), "layers choose for themselves"
    assert all(record.agg_err < 1e-12 for record in records), "one factor is common, so the mean is exact"


def test_only_what_moved_is_sent(tiny):
    engine, server = federation(tiny)
    _, records = advance(engine, server, 2)
    size = {f: sum(v.nbytes for n, v in server.state.items() if n.endswith(f".{f}")) for f in "AB"}
    rest = sum(v.nbytes for n, v in server.state.items() if is_model(n) and n[-2:] not in (".A", ".B"))
    scores = 8 * len([n for n in engine.keys if n.endswith(".A")])
    assert [r.bytes_up for r in records] == [3 * (size[f] + rest + scores) for f in "BA"]


def test_probabilities_are_the_cards():
    assert probability(3.0, 1.0, 0.5) == pytest.approx(1 / (1 + math.exp(-(2 / 4) / 0.5)))
    assert probability(0.0, 0.0, 0.1) == 0.5 and probability(1.0, -1.0, 1.0) == probability(5.0, -5.0, 1.0)
    assert probability(1.0, 0.0, 0.1) > 0.9999 > probability(1.0, 0.0, 1.0)


def test_a_coin_has_the_freedom_the_bytes_and_the_draws_and_no_score(tiny):
    """The control: what it draws is what AS-LoRA draws when all scores are zero, whatever the scores are."""
    row = ROW.but(choice="coin")
    engine, server = federation(tiny, row)
    moved, records = advance(engine, server, 9)
    other, plain = federation(tiny)
    scored, told = advance(other, plain, 9)
    assert moved[:4] == scored[:4] and moved[4:] != scored[4:]
    assert [r.bytes_up for r in records[:4]] == [r.bytes_up for r in told[:4]]
    update = {f"{SCORE}layer{i}": torch.tensor(float(i), dtype=torch.float64) for i in range(40)}
    silent = {name: torch.zeros_like(value) for name, value in update.items()}
    start = {ROUND: torch.tensor(8)} | {f"{MODE}layer{i}": torch.tensor(float(i % 2)) for i in range(40)}

    def drawn(rule, said):
        out = rule(start, [Update(0, {"w.A": torch.zeros(1)} | said, 1.0)])
        return [float(out[f"{MODE}layer{i}"]) for i in range(40)]

    assert drawn(row.rule, update) == drawn(row.rule, silent) == drawn(ROW.rule, silent) != drawn(ROW.rule, update)
    assert 10 < sum(drawn(row.rule, update)) < 30
    with pytest.raises(FedloraError, match="choice of AS-LoRA 'dice'; accepted: coin, score"):
        ROW.but(choice="dice")


def test_the_draws_follow_the_seed_of_the_run_unless_the_row_says_another():
    config = RunConfig(method="as_lora", seed=3)
    for other, seed in ((config, 3), (config.but(seed=4), 4), (config.but(change={"seed": 7}), 7)):
        assert other.row.rule == Selection(warmup=2, seed=seed)
    assert RunConfig(method="rolora", seed=3).row == METHODS["rolora"], "a mean draws nothing"


def test_the_warm_up_is_a_tenth_of_the_run_even_and_at_least_two_rounds():
    config = RunConfig(method="as_lora", seed=0)
    for rounds, warmup in ((1, 2), (10, 2), (40, 4), (100, 10)):
        assert config.but(rounds=rounds).row.rule.warmup == warmup
    assert config.but(rounds=100, change={"warmup": 4}).row.rule.warmup == 4
    assert "(not DP)" in METHODS["as_lora"].but(curvature="raw").work.label
    assert "(not DP)" not in METHODS["as_lora"].work.label


def told(scores):
    one = {f"{SCORE}{path}": torch.tensor(value, dtype=torch.float64) for path, value in scores.items()}
    return [Update(k, {"a.B": torch.zeros(2)} | one, 1.0) for k in range(2)]


def test_only_the_factor_that_moved_gets_a_new_score():
    rule, state = Selection(memory=0.9), {"a.B": torch.zeros(2)}
    state |= rule(state, told({"a": 4.0}))  # B moved
    state |= {f"{MODE}a": torch.tensor(0.0)}
    state |= rule(state, told({"a": 2.0}))  # B again
    assert float(state["~~as/B/a"]) == pytest.approx(0.9 * 4 + 0.1 * 2) and "~~as/A/a" not in state
    state |= {f"{MODE}a": torch.tensor(1.0)}
    state |= rule(state, told({"a": 7.0}))  # A
    assert float(state["~~as/A/a"]) == 7 and float(state["~~as/B/a"]) == pytest.approx(3.8)
    assert int(state[ROUND]) == 3


def test_the_better_factor_is_drawn_more_often_as_it_cools():
    rule, share = Selection(), {}
    for round in (5, 60):
        base = {
            "a.B": torch.zeros(2),
            "~~as/A/a": torch.tensor(3.0),
            "~~as/B/a": torch.tensor(1.0),
            f"{MODE}a": torch.tensor(1.0),
        }
        draws = [
            float(replace(rule, seed=seed)(base | {ROUND: torch.tensor(round)}, told({"a": 3.0}))[f"{MODE}a"])
            for seed in range(200)
        ]
        share[round] = sum(draws) / 200
    assert 0.5 < share[5] < 0.75 and share[60] > 0.98


def test_a_score_is_the_predicted_decrease_without_the_noises_energy():
    """On a quadratic with curvature k a step of eta along g lowers the loss by eta ||g||^2 (1 - eta k / 2)."""
    g, eta, k = torch.tensor([3.0, 4.0]), 0.1, 2.0
    assert eta * score(g, 0.0, eta, k) == pytest.approx(eta * 25 * (1 - eta * k / 2))
    noisy = 1.5 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert abs(score(noisy, 1.5, eta, 0.0)) < 0.02 * float(noisy.square().sum())
    assert score(0.1 * g, 5.0, eta, 0.0) == 0


def test_in_the_mean_a_score_is_that_of_the_gradient_under_the_noise():
    """Nor is more taken off: the energy of 10,000 entries of noise is 22,500, that of the gradient 4,000."""
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(10_000, generator=rng)
    g *= 4000**0.5 / g.norm()
    found = [score(g + 1.5 * torch.randn(10_000, generator=rng), 1.5, 0.1, 0.0) for _ in range(40)]
    assert sum(found) / 40 == pytest.approx(4000, abs=180), "three deviations of this mean"


def test_the_released_curvature_is_the_quadratics(tiny):
    """g = k theta: two gradients at two places give k."""
    engine, _ = federation(tiny)
    [name] = [n for n in engine.keys if n.endswith(".B")][:1]
    at, where = torch.randn(3, 2), torch.randn(3, 2)
    now = Recorder({name: 2.5 * at}, {name: at})
    assert Selected()._kappa(engine.members[0], name, now, 2.5 * where, where) == pytest.approx(2.5, rel=1e-5)
    assert Selected("none")._kappa(engine.members[0], name, now, where, where) == 0


@pytest.mark.slow
def test_the_raw_curvature_is_the_second_difference_of_the_loss_on_the_last_batch(tiny):
    engine, server = federation(tiny, replace(ROW, work=Selected("raw")))
    advance(engine, server, 3)
    member, now = engine.members[0], Recorder(raw=True)
    member.fit(4, objective=(now,))
    assert len(now.drawn[0]) == BUDGET.batch
    state, h = member.tensors | now.at, 1e-3
    for name, g in now.last.items():
        v = g / g.norm()
        moved = [call(engine.setting.model, state | {name: now.at[name] + a * v}, now.drawn[0]) for a in (h, 0, -h)]
        up, here, down = (float(task_loss(logits, now.drawn[1]).mean()) for logits in moved)
        found = Selected("raw")._kappa(member, name, now, None, None)
        assert found == pytest.approx((up - 2 * here + down) / h**2, rel=1e-2, abs=1e-7), name


@pytest.mark.slow
def test_before_its_first_round_no_curvature_enters_a_score(tiny):
    """The published code has it in the last ten rounds only."""
    told = {}
    for work in (Selected("none"), Selected("raw"), Selected("raw", since=3)):
        engine, server = federation(tiny, replace(ROW, work=work))
        records = [{}, {}, {}]
        for t in range(3):
            advance(engine, server, t + 1)
            records[t] = {n: float(v) for n, v in server.state.items() if n.startswith("~~as/")}
        told[work] = records
    none, raw, late = told.values()
    assert late[:2] == none[:2] and late[2] != none[2] and raw[0] != none[0]


def test_the_raw_curvature_enters_in_the_last_ten_rounds_of_a_run_unless_told():
    def work(rounds, **change):
        return RunConfig(method="as_lora", rounds=rounds, change=change).row.work

    assert work(30, curvature="raw").since == 21 and work(8, curvature="raw").since == 1
    assert work(30, curvature="raw", since=3).since == 3 and work(30).since is None


def test_the_raw_curvature_reads_images_and_is_refused_under_a_budget(tiny):
    raw = replace(ROW, work=Selected("raw"))
    engine, server = federation(tiny, raw)
    advance(engine, server, 1)
    with pytest.raises(FedloraError, match="no privacy budget"):
        federation(tiny, raw, Guarding(DPSGD(1.0, 0.5), budget=8.0))
    engine, server = federation(tiny, ROW, Guarding(DPSGD(1.0, 0.5)))
    advance(engine, server, 3)
    assert all(member.ledger.releases[0].times == 6 for member in engine.members), "scoring releases nothing more"


@pytest.mark.parametrize("q", [0.5, 1e-9])
def test_the_raw_curvature_may_be_tried_under_noise_without_a_budget_though_nobody_be_drawn(tiny, q):
    scores = []
    for curvature in ("raw", "none"):
        engine, server = federation(tiny, replace(ROW, work=Selected(curvature)), Guarding(DPSGD(1.0, q)))
        advance(engine, server, 1)
        scores.append({name: float(value) for name, value in server.state.items() if name.startswith("~~as/B/")})
        assert scores[-1] and all(map(math.isfinite, scores[-1].values()))
    assert (scores[0] == scores[1]) == (q < 0.5), "no image, no curvature"


def test_a_filter_does_not_touch_what_is_scored(tiny):
    """The noise's energy is taken off as the mechanism has it, not as a filter leaves it."""
    told = []
    for row in (ROW, ROW.but(filter="rescaled")):
        engine, _ = federation(tiny, replace(row, work=Selected("none")), Guarding(DPSGD(1.0, 0.5)))
        budget = replace(BUDGET, steps=1)  # the first step's gradient does not depend on filters
        engine.setting.budget = budget
        told.append(engine.members[0].setting.method.work.round(engine.members[0], 1)[2])
    assert told[0] and all(torch.equal(told[0][name], told[1][name]) for name in told[0])


def test_alternating_by_step_moves_one_factor_a_step(tiny):
    for name, order in (("la_lora", "B"), ("la_lora_pre", "B"), ("la_lora:first=A", "A")):
        method, change = parse_arm(name)
        engine, server = federation(tiny, METHODS[method].but(**change))
        start, member = dict(server.state), engine.members[0]
        start |= {n: 0.1 * torch.ones_like(v) for n, v in start.items() if n.endswith(".B")}  # at B = 0 no A moves
        for steps, moves in ((1, order), (2, "AB")):
            end = member.fit(1, start, budget=replace(BUDGET, steps=steps))[0]
            changed = {engine.keys[n].factor for n in engine.keys if not torch.equal(end[n], start[n])}
            assert changed & {"A", "B"} == set(moves), name


def test_a_first_step_on_a_at_b_zero_has_nothing_to_follow(tiny):
    engine, server = federation(tiny, METHODS["la_lora"].but(first="A"))
    end = engine.members[0].fit(1, budget=replace(BUDGET, steps=1))[0]
    assert all(torch.equal(end[n], server.state[n]) for n in engine.keys if n.endswith((".A", ".B")))


@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "la_lora", "la_lora_pre", "as_lora"])
def test_every_private_row_takes_every_filter_behind_its_own_terms(name):
    for kind, terms in FILTERS.items():
        row = METHODS[name].but(filter=kind)
        assert row.objective == METHODS[name].objective + terms and row.schedule is METHODS[name].schedule


def test_only_what_takes_turns_has_a_first_factor():
    assert METHODS["rolora"].but(first="A", filter="low-pass").schedule.label == "A in odd rounds, B in even"
    assert METHODS["la_lora"].but(first="B").schedule.label == METHODS["la_lora"].schedule.label
    with pytest.raises(FedloraError, match="no factor is first"):
        METHODS["ffa"].but(first="A")
    with pytest.raises(FedloraError, match="unknown factor 'C'"):
        METHODS["la_lora"].but(first="C")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Selection(warmup=3), "even"),
        (lambda: Selection(memory=2.0), "memory"),
        (lambda: Selection(coldest=0.0), "coldest"),
        (lambda: Selected("exact"), "unknown curvature of AS-LoRA 'exact'"),
        (lambda: Selected(since=0), "since must be a round"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(FedloraError, match=message):
        call()


def test_states_stay_finite_under_noise(tiny):
    engine, server = federation(tiny, ROW, Guarding(DPSGD(5.0, 0.2)))
    advance(engine, server, 3)
    assert S.finite(server.state)
