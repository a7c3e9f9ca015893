"""Every row of the table: clients have no order, the unit of their weights means nothing, equal clients are one.

With full batches, no mirrored images and plain SGD in float64, so that a client's training depends on its data alone.
"""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.calibrated import SiteAttention
from fedlora_mini.data import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import METHODS, Budget, Server, federate, member, sampling
from fedlora_mini.federation.aggregation import Krum, Nova, TrimmedMean, mean, median, uniform, weighted
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.works import fusion
from fedlora_mini.models import build

# Rows in which a client's number matters: FDLoRA's search has random numbers by client, FedDG draws how far an image is
# restyled by its place in the batch, which is shuffled by client, and LC-Fed's network is told the number. What
# holds of them without it has tests of its own.
NUMBERED = ("fdlora", "feddg", "lcfed")
MEANS = (mean, uniform, weighted, median, Nova(), TrimmedMean(), Krum())  # of equal updates, each is the update
pytestmark = pytest.mark.slow
ROUNDS = 3  # one more than it takes until messages have come and gone


@pytest.fixture(scope="module")
def splits(tiny):
    """Three clients of 1, 2 and 4 images: three weights, and a batch of 8 holds all images equally often."""
    return [
        Split(site.train.images[:n].double(), site.train.masks[:n])
        for site, n in zip(tiny.sites, (1, 2, 4), strict=True)
    ]


def begun(name, splits, classes=6):
    """The engine and the server before the first round."""
    row, budget = METHODS[name], Budget(2, 8, 1e-2, "sgd", augment=False)
    model = build("minisam", classes, d=16, depth=1, stem=4, width=4)
    options = {"sites": len(splits)} if row.adapter == "lcfed" else {}
    model = prepare(model, row.adapter, **options).double()
    for module in model.modules():
        if isinstance(module, SiteAttention):  # all clients' columns start alike
            module.W1.data[:, -module.sites :] = 0
    start = trainable(model)
    return LocalEngine(model, row, keys(model, list(start)), splits, budget, 0, "sequential"), Server(start)


def federated(name, splits):
    """The server's model and what every client has of its own; the server's notes bear the clients' numbers."""
    engine, server = begun(name, splits)
    everyone, steps = lambda round: engine.clients, engine.setting.budget.steps
    list(federate(METHODS[name], engine, server, engine.keys, ROUNDS, steps, everyone, layers=engine.setting.layers))
    return products(S.pick(server.state, is_model)), [possession(engine, member, server) for member in engine.members]


def alone(name, split):
    """What a client has that nobody answers: every round begins where its own last one ended, without a rule."""
    engine, _ = begun(name, [split])
    [member] = engine.members
    for round in range(1, ROUNDS + 1):
        end, _, messages = METHODS[name].work.round(member, round)
        member.memory |= end | messages
    return possession(engine, member, Server(member.tensors))


def possession(engine, member, server):
    """A client's own model, its private tensors and the numbers that its work keeps: all that is not the server's.

    ResFIM's masks are seen in its model alone: which entries of a bias in front of a norm they keep is up to rounding.
    """
    notes = S.pick(member.notes, lambda name: name.startswith(engine.method.work.notes))
    notes = {name: value for name, value in notes.items() if value.is_floating_point()}
    return products(
        {f"model/{name}": value for name, value in engine.personal(member.number, server).items()}
        | {f"own/{name}": value for name, value in member.own(member.memory).items()}
        | {f"note/{name}": value for name, value in notes.items()}
    )


def products(state):
    """B A for every pair: an SVD leaves the sign of a direction open."""
    rest = S.pick(state, lambda name: name.rpartition(".")[2] not in ("A", "B"))
    pairs = {name.removesuffix(".A") for name in state if name.endswith(".A") and f"{name[:-2]}.B" in state}
    return rest | {path: state[f"{path}.B"] @ state[f"{path}.A"] for path in pairs}


def near(one, other):
    return set(one) == set(other) and S.norm(S.sub(one, other)) < 1e-9 * max(S.norm(one), 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_order_of_the_clients_nor_the_unit_of_their_weights_matters(splits, name):
    """Three federations a row: as it is, with the clients in another order, with twice the images everywhere."""
    order, (state, own) = [2, 0, 1], federated(name, splits)
    if name not in NUMBERED:
        again, moved = federated(name, [splits[k] for k in order])
        assert near(state, again)
        assert all(near(own[k], mine) for k, mine in zip(order, moved, strict=True))
    if name != "feddg":  # it draws a style an image
        again, doubled = federated(name, [Split.concat([split, split]) for split in splits])
        assert near(state, again) and all(map(near, own, doubled))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NUMBERED])
def test_equal_clients_end_like_one_of_them_however_many(splits, name):
    """And where the rule is a mean, like one that trains by itself."""
    state, own = federated(name, splits[1:2] * 3)
    again, others = federated(name, splits[1:2] * 4)
    assert near(state, again)
    assert all(near(own[0], mine) for mine in own + others)
    assert METHODS[name].rule not in MEANS or near(own[0], alone(name, splits[1]))


@pytest.fixture
def without_numbers(monkeypatch):
    """Random numbers that do not depend on the client."""

    def common(seed, round, client, *purpose):
        return sampling.generator(seed, round, *purpose)

    for module in (member, fusion):
        monkeypatch.setattr(module, "generator", common)


@pytest.mark.parametrize("name", ["fdlora", "feddg"])
def test_without_random_numbers_by_client_there_is_no_order(splits, without_numbers, name):
    """FedDG draws from the others' styles as they are, and not by who sent them."""
    order, (state, own) = [2, 0, 1], federated(name, splits)
    again, moved = federated(name, [splits[k] for k in order])
    assert near(state, again)
    assert all(near(own[k], mine) for k, mine in zip(order, moved, strict=True))


@pytest.mark.parametrize("name", ["fdlora", "feddg"])
def test_equal_clients_with_equal_random_numbers_end_alike(splits, without_numbers, name):
    state, own = federated(name, splits[1:2] * 3)
    again, others = federated(name, splits[1:2] * 4)
    assert near(state, again)
    assert all(near(own[0], mine) for mine in own + others)


def test_lcfed_with_the_clients_in_another_order_is_the_same_with_other_numbers(splits):
    """Columns for the one-hot vector and the place of a head among the others move with the client, nothing else."""
    order, (state, own) = [2, 0, 1], federated("lcfed", splits)
    again, moved = federated("lcfed", [splits[k] for k in order])
    assert near(renumbered(state, order), again) and not near(state, again)
    assert all(near(renumbered(own[k], order), mine) for k, mine in zip(order, moved, strict=True))


def renumbered(state, order):
    """The tensors of LC-Fed's adapters as they would be with client order[i] in the place of client i."""
    out = dict(state)
    for name, value in state.items():
        factor, K = name.rpartition(".")[2], len(order)
        if factor == "W1":
            out[name] = torch.cat([value[:, :-K], value[:, -K:][:, order]], 1)
        elif factor in ("site", "D_rest", "d_rest"):
            out[name] = value[order]
    return out
