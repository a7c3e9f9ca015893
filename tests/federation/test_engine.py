"""The in-process engine: what stays, what travels, and that both executions agree."""

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.registry import ADAPTERS
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Budget, Server, Work, federate
from fedlora_mini.federation.client import moves_at_all
from fedlora_mini.models import build

BUDGET = Budget(steps=3, batch=2, lr=1e-2)
FEW = ("fedit", "fedavg", "iat", "ditto", "as_lora")  # what `make quick` looks at


def marked(names):
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


def federation(name, data, execution="auto", dtype=torch.float32, budget=BUDGET, seed=0, network="minisam"):
    row = METHODS[name]
    options = {"d": 16, "depth": 1, "stem": 4, "width": 4} if network == "minisam" else {"norm": "batch"}
    plain = build(network, len(data.classes), **options) if isinstance(network, str) else network(len(data.classes))
    model = prepare(plain, row.adapter).to(dtype)
    start = trainable(model)
    table = keys(model, list(start))
    splits = [type(site.train)(site.train.images.to(dtype), site.train.masks) for site in data.sites]
    engine = LocalEngine(model, row, table, splits, budget, seed, execution)
    return model, engine, Server(start)


def advance(engine, server, rounds=2):
    row, layers = engine.method, engine.setting.layers
    everyone = lambda round: engine.clients  # noqa: E731
    return list(federate(row, engine, server, engine.keys, rounds, BUDGET.steps, everyone, layers=layers))


def groupable(row):
    """Rows whose clients may train in one pass."""
    plain = type(row.work) is Work and all(term.grouped for term in row.objective)
    return plain and ADAPTERS[row.adapter].grouped and not getattr(row.rule, "folds", False)


def final(engine, server):
    return [server.state, *(engine.memory[client] for client in engine.clients)]


@pytest.mark.parametrize("name", marked(METHODS))
def test_the_same_seed_twice_gives_the_same_bytes_and_another_seed_others(tiny, name):
    digests = []
    for seed in (0, 0, 1):
        _, engine, server = federation(name, tiny, seed=seed)
        advance(engine, server)
        digests.append(S.digest(final(engine, server)))
    assert digests[0] == digests[1] != digests[2]


class Dropping(nn.Module):
    """A small network with dropout."""

    def __init__(self, classes):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.5))
            self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.parametrize("name", ["fedavg", "ditto", "moon"])
def test_dropout_follows_the_seed_and_leaves_the_generator_of_pytorch_alone(tiny, name):
    digests, before = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        _, engine, server = federation(name, tiny, seed=seed, network=Dropping)
        advance(engine, server)
        digests.append(S.digest(final(engine, server)))
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_by_client_round_and_purpose(tiny):
    _, engine, _ = federation("fedavg", tiny, network=Dropping)
    same, drawn = tiny.sites[0].train, []
    for client, round, purpose in (
        (0, 1, "batches"),
        (0, 1, "batches"),
        (1, 1, "batches"),
        (0, 2, "batches"),
        (0, 1, "x"),
    ):
        member = engine.members[client]
        member.batches = lambda *_: lambda step: (same.images[:2], same.masks[:2])
        drawn.append(S.digest(member.fit(round, purpose=purpose)[0]))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


def test_dropout_has_no_grouped_execution_where_it_is_active(tiny):
    with pytest.raises(FedloraError, match="no group axis"):
        federation("fedavg", tiny, "grouped", network=Dropping)


@pytest.mark.parametrize("name", marked(n for n, m in METHODS.items() if groupable(m) and not m.pooled))
def test_grouped_clients_end_like_sequential_ones(tiny, name):
    """Exact in real arithmetic; in float64, after two rounds of Adam, to 1e-7 relative."""
    ends = []
    for execution in ("sequential", "grouped"):
        _, engine, server = federation(name, tiny, execution, torch.float64)
        records = advance(engine, server)
        ends.append((final(engine, server), [record.loss for record in records]))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert S.norm(S.sub(one, other)) < 1e-7 * S.norm(one)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)


def test_full_weights_have_no_grouped_execution(tiny):
    with pytest.raises(FedloraError, match="sequential"):
        federation("fedavg", tiny, "grouped")
    assert not federation("fedavg", tiny, "auto")[1].grouped


@pytest.mark.parametrize("name", marked(METHODS))
def test_what_is_shared_is_equal_everywhere_and_what_is_private_differs(tiny, name):
    """As the clients hold it when round 3 begins. What no optimiser moves is neither: the federation gives it."""
    _, engine, server = federation(name, tiny)
    held = {}
    for member in engine.members:

        def receive(request, member=member, take=member.receive):
            take(request)
            held[member.number] = S.clone(member.memory)

        member.receive = receive
    advance(engine, server, 3)
    first, *others = held.values()
    for tensor, key in engine.keys.items():
        equal = all(torch.equal(first[tensor], other[tensor]) for other in others)
        assert equal or engine.private(tensor), tensor
        if engine.private(tensor) and moves_at_all(key, engine.setting.layers):
            assert not equal, f"{tensor} is private, and yet equal on all clients"


def test_a_factor_that_does_not_move_keeps_its_bits(tiny):
    _, engine, server = federation("ffa", tiny)
    before = S.clone(server.state)
    advance(engine, server)
    for name, value in server.state.items():
        assert torch.equal(value, before[name]) == name.endswith(".A")


def test_rolora_moves_one_factor_a_round(tiny):
    _, engine, server = federation("rolora", tiny)
    before = S.clone(server.state)
    for round, factor in ((1, "B"), (2, "A")):
        advance(engine, server, rounds=round)
        moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], server.state[name])}
        assert moved == {factor, "D", "d"}
        before = S.clone(server.state)


def test_the_base_keeps_its_bits(tiny):
    model, engine, server = federation("fedit", tiny)
    before = {n: p.clone() for n, p in model.named_parameters()}
    advance(engine, server)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_fedbn_keeps_norms_at_home_statistics_too(tiny):
    _, engine, server = federation("fedbn", tiny, network="unet")
    advance(engine, server)
    private = {name.rpartition(".")[2] for name in server.state if engine.private(name)}
    assert private == {"weight", "bias", "running_mean", "running_var"}
    norms = {key.path for key in engine.keys.values() if key.kind == "norm"}
    assert norms == {name.rpartition(".")[0] for name in server.state if engine.private(name)}
    statistic = next(name for name in server.state if name.endswith("running_mean"))
    assert not torch.equal(engine.memory[0][statistic], engine.memory[1][statistic])


def test_a_client_that_diverges_keeps_its_last_good_private_state(tiny):
    _, engine, server = federation("fedsa", tiny)
    advance(engine, server, rounds=1)
    kept = S.clone(S.pick(engine.memory[1], engine.private))
    broken = engine.members[1].data
    engine.members[1].data = type(broken)(torch.full_like(broken.images, float("nan")), broken.masks)
    [record] = advance(engine, server, rounds=2)
    assert len(record.refused) == 1 and "client 1" in record.refused[0]
    assert S.digest(S.pick(engine.memory[1], engine.private)) == S.digest(kept)
    assert S.finite(server.state)


def test_fedprox_pulls_towards_the_start(tiny):
    distances = []
    for name in ("fedit", "fedprox"):
        _, engine, server = federation(name, tiny)
        if name == "fedprox":
            engine.setting.method = engine.method.but(mu=10.0)
        before = S.clone(server.state)
        advance(engine, server, rounds=1)
        distances.append(S.norm(S.sub(server.state, before)))
    assert distances[1] < distances[0]


def test_the_common_model_holds_the_weighted_mean_of_private_tensors(tiny):
    _, engine, server = federation("fedsa", tiny)
    advance(engine, server)
    common = engine.common(server)
    name = next(n for n in common if engine.private(n))
    expected = torch.stack([engine.memory[c][name] for c in engine.clients]).mean(0)  # equal sizes
    assert torch.allclose(common[name], expected)
