"""Frozen weights that a federation changes: dense algebra on clients and server, over rounds and absences."""

import copy
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import adapters, call, keys, prepare, trainable
from fedlora_mini.adapters.ops import TRANSPOSED
from fedlora_mini.engines import LocalEngine
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.federation import METHODS, Budget, Server, federate, train
from fedlora_mini.federation.fold import fold, fresh, products_in
from fedlora_mini.models import build
from fedlora_mini.regularizers import Diversity, FlatNoise, WeightDecay
from watched import Watched

BUDGET = Budget(steps=2, batch=2, lr=2e-2)
FOLDING = ("flora", "fedex")


def federation(name, data, dtype=torch.float64, ranks=None):
    """s = 3, so that nothing hides it."""
    model = prepare(build("minisam", len(data.classes), d=16, depth=1, stem=4, width=4), "lora", rank=2, alpha=6.0)
    model = model.to(dtype)
    start = trainable(model)
    splits = [type(site.train)(site.train.images.to(dtype), site.train.masks) for site in data.sites]
    splits[1] = type(splits[1])(splits[1].images[:4], splits[1].masks[:4])  # unequal weights
    engine = LocalEngine(model, METHODS[name], keys(model, list(start)), splits, BUDGET, ranks=ranks)
    return model, Watched(engine), Server(start, ranks=dict(ranks or {}))


def rounds(watched, server, choose=None):
    """One round an iteration."""
    setting = watched.engine.setting
    everyone = choose or (lambda round: watched.clients)
    return federate(setting.method, watched, server, setting.keys, 99, BUDGET.steps, everyone, layers=setting.layers)


def dense(layer, B, A):
    """s B A in the weight's layout, from its definition: m outputs, n = inputs x kernel."""
    product = 3 * B @ A
    if isinstance(layer.base, TRANSPOSED):
        return product.view(len(B), layer.base.in_channels, *layer.base.kernel_size).transpose(0, 1)
    return product.view(layer.base.weight.shape)


def weight_of(state, path, layer):
    return state.get(f"{path}.base.weight", layer.base.weight)


def pairs(model):
    return [(path, layer) for path, layer in adapters(model) if "A" in layer.factors]


@pytest.mark.parametrize("name", FOLDING)
def test_two_rounds_by_dense_algebra_on_clients_and_server_alike(tiny, name):
    """FLoRA: W_0 + s Σ p B A. FedEx: the same less s B̄ Ā, which the mean of the factors still stands for."""
    model, watched, server = federation(name, tiny)
    expected = {path: layer.base.weight.clone() for path, layer in pairs(model)}
    steps = rounds(watched, server)
    for _ in range(2):
        next(steps)
        updates = watched.updates[-1]
        total = sum(u.weight for u in updates)
        for path, layer in pairs(model):
            terms = [(u.weight / total, u.state[f"{path}.B"], u.state[f"{path}.A"]) for u in updates]
            expected[path] += sum(p * dense(layer, B, A) for p, B, A in terms)
            if name == "fedex":
                B, A = (sum(p * t[i] for p, *t in terms) for i in (0, 1))
                expected[path] -= dense(layer, B, A)
            torch.testing.assert_close(weight_of(server.state, path, layer), expected[path])
            assert not torch.equal(expected[path], layer.base.weight)
    next(steps)  # the clients fold the second round's products when they are told of them
    for member in watched.engine.members:
        for path, layer in pairs(model):
            torch.testing.assert_close(weight_of(member.memory, path, layer), expected[path])


@pytest.mark.parametrize("name", FOLDING)
def test_clients_and_server_hold_the_same_bits_and_the_network_its_own(tiny, name):
    model, watched, server = federation(name, tiny, torch.float32)
    before = S.digest(model.state_dict())
    steps = rounds(watched, server)
    next(steps)
    held = S.clone(server.state)
    next(steps)
    for member in watched.engine.members:  # as they were told at the start of round 2
        for path, _ in pairs(model):
            assert torch.equal(member.memory[f"{path}.base.weight"], held[f"{path}.base.weight"])
    assert S.digest(model.state_dict()) == before


@pytest.mark.parametrize("name", FOLDING)
def test_a_client_that_skips_rounds_ends_with_the_others_weights(tiny, name):
    """Client 1 misses rounds 2 and 3, client 2 the first: then they get the weights, the others thin products."""
    model, watched, server = federation(name, tiny, torch.float32)
    present = {1: [0, 1], 2: [0, 2], 3: [0, 2], 4: [0, 1, 2], 5: [0, 1, 2]}
    steps = rounds(watched, server, present.__getitem__)
    for t in range(1, 6):
        held = S.clone(server.state)
        next(steps)
        for client in present[t]:
            memory = watched.engine.memory[client]
            for path, layer in pairs(model):
                assert torch.equal(weight_of(memory, path, layer), weight_of(held, path, layer)), (t, client, path)
    whole = [
        {client: any(n.endswith(".base.weight") for n in r.state) for client, r in requests.items()}
        for requests in watched.requests
    ]
    assert whole == [{0: False, 1: False}, {0: False, 2: False}, {0: False, 2: False},
                     {0: False, 1: True, 2: False}, {0: False, 1: False, 2: False}]  # fmt: skip


def test_a_client_that_did_not_answer_gets_the_weights(tiny):
    """It may not have heard what it was told: its next news are the weights, not a product on top of them."""
    model, watched, server = federation("flora", tiny, torch.float32)
    steps = rounds(watched, server)
    next(steps)
    exchange = watched.engine.exchange
    watched.engine.exchange = lambda requests: exchange({k: r for k, r in requests.items() if k != 2})
    assert next(steps).refused == ["client 2: no answer"]
    watched.engine.exchange = exchange
    held = S.clone(server.state)
    next(steps)
    for path, _ in pairs(model):
        assert torch.equal(watched.engine.memory[2][f"{path}.base.weight"], held[f"{path}.base.weight"])


@pytest.mark.parametrize("term", [WeightDecay(0.1), FlatNoise(), Diversity(2, 1.0, 1.0)], ids=lambda term: term.label)
def test_terms_on_frozen_weights_go_along_with_a_fold(tiny, term):
    model, watched, server = federation("flora", tiny)
    watched.engine.setting.method = replace(METHODS["flora"], objective=(term,))
    steps = rounds(watched, server)
    next(steps)
    twin, setting = copy.deepcopy(model), watched.engine.setting
    for path, layer in pairs(twin):
        layer.base.weight.data.copy_(server.state[f"{path}.base.weight"])
    start = S.clone(S.pick(server.state, setting.keys.__contains__))
    next(steps)
    batches = watched.engine.members[0].batches(2, BUDGET)
    [expected], _ = train(twin, setting.method, setting.keys, [start], batches, BUDGET, 2)
    found = watched.updates[1][0].state
    assert S.norm(S.sub(found, expected)) < 1e-9 * S.norm(expected)


def test_thin_products_are_smaller_than_the_weights(tiny):
    _, watched, server = federation("flora", tiny)
    steps = rounds(watched, server, {1: [0], 2: [0], 3: [0, 1]}.__getitem__)
    *_, record = (next(steps) for _ in range(3))
    thin, whole = (S.nbytes(watched.requests[2][client].state) for client in (0, 1))
    assert thin < whole and record.bytes_down == thin + whole


def test_after_flora_factors_begin_anew_and_alike(tiny):
    """Drawn by the round: the same on all clients and the server, others in every round, B zero."""
    model, watched, server = federation("flora", tiny, torch.float32)
    starts, seen = [S.clone(server.state)], []
    fit = type(watched.engine.members[0]).fit

    def spy(self, round, *args, **kwargs):
        seen.append((round, S.clone(self.tensors)))
        return fit(self, round, *args, **kwargs)

    for member in watched.engine.members:
        member.fit = spy.__get__(member)
    steps = rounds(watched, server)
    for _ in range(3):
        next(steps)
        starts.append(S.clone(server.state))
    for path, _ in pairs(model):
        for round, state in seen:
            for factor in "AB":
                assert torch.equal(state[f"{path}.{factor}"], starts[round - 1][f"{path}.{factor}"])
            assert not state[f"{path}.B"].any() and state[f"{path}.A"].any()
        A = [start[f"{path}.A"] for start in starts]
        bound = A[0].shape[1] ** -0.5
        assert all(float(each.abs().max()) <= bound for each in A)
        assert all(not torch.equal(A[i], A[j]) for i in range(4) for j in range(i))
    assert [round for round, _ in seen] == [1] * 3 + [2] * 3 + [3] * 3


def test_clients_of_other_ranks_begin_anew_with_the_first_rows(tiny):
    model, watched, server = federation("flora", tiny, ranks={1: 1})
    steps = rounds(watched, server)
    next(steps), next(steps)
    for path, layer in pairs(model):
        of = {u.client: u.state for u in watched.updates[1]}
        assert of[0][f"{path}.A"].shape[0] == 2 and of[1][f"{path}.A"].shape[0] == 1
        assert server.products[f"{path}.fold.A"].shape[0] == 2 + 1 + 2
        start = fresh({f"{path}.A": torch.zeros(2, layer.A.shape[1]), f"{path}.B": layer.B}, 2, {path: layer})
        memory = watched.engine.members[1].memory
        torch.testing.assert_close(memory[f"{path}.A"].float(), start[f"{path}.A"][:1])


@pytest.mark.parametrize("name", FOLDING)
def test_a_clients_own_output_is_the_servers(tiny, name):
    """FLoRA's is the frozen network with W in place of W_0; FedEx's has the mean of the factors beside it."""
    model, watched, server = federation(name, tiny)
    steps = rounds(watched, server)
    next(steps), next(steps)
    x = tiny.sites[0].test.images.double()
    outputs = [call(model, watched.engine.personal(client, server), x) for client in watched.clients]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    state = server.state
    by_hand = {f"{path}.base.weight": weight_of(state, path, layer) for path, layer in pairs(model)}
    by_hand |= {n: v for n, v in state.items() if name == "fedex" or n.startswith("head")}
    torch.testing.assert_close(outputs[0], call(model, by_hand, x))
    assert not torch.allclose(outputs[0], model(x))


def test_fedex_is_the_mean_of_the_products(tiny):
    """W_0 + s Σ p B A: after a round, one model for all, exactly the one that FLoRA makes of the same updates."""
    model, watched, server = federation("fedex", tiny)
    next(rounds(watched, server))
    updates = watched.updates[0]
    total = sum(u.weight for u in updates)
    for path, layer in pairs(model):
        W = weight_of(server.state, path, layer)
        W = W + dense(layer, server.state[f"{path}.B"], server.state[f"{path}.A"])
        change = sum(u.weight / total * dense(layer, u.state[f"{path}.B"], u.state[f"{path}.A"]) for u in updates)
        torch.testing.assert_close(W, layer.base.weight + change)


@pytest.mark.parametrize("name", FOLDING)
def test_clients_train_on_the_folded_weights(tiny, name):
    """Client 0's second update is that of a network that has W in its layers."""
    model, watched, server = federation(name, tiny)
    steps = rounds(watched, server)
    next(steps)
    twin, setting = copy.deepcopy(model), watched.engine.setting
    for path, layer in pairs(twin):
        layer.base.weight.data.copy_(server.state[f"{path}.base.weight"])
    start = S.clone(S.pick(server.state, setting.keys.__contains__))
    next(steps)
    batches = watched.engine.members[0].batches(2, BUDGET)
    [expected], _ = train(twin, setting.method, setting.keys, [start], batches, BUDGET, 2)
    found = watched.updates[1][0].state
    assert S.norm(S.sub(found, expected)) < 1e-9 * S.norm(expected)


# ---------------------------------------------------------------- the functions alone


def test_what_is_a_product():
    state = {"a.fold.A": torch.zeros(1), "a.fold.B": torch.zeros(1), "a.A": torch.zeros(1), "fold.x": torch.zeros(1)}
    assert products_in(state).keys() == {"a.fold.A", "a.fold.B"}


def test_a_fold_goes_on_from_the_weights_in_the_state_and_changes_nothing_it_is_given(tiny):
    model, _, server = federation("flora", tiny)
    layers, rng = dict(pairs(model)), torch.Generator().manual_seed(0)
    products = {}
    for path, layer in layers.items():
        products[f"{path}.fold.A"] = torch.randn(5, layer.A.shape[1], generator=rng).double()
        products[f"{path}.fold.B"] = torch.randn(layer.B.shape[0], 5, generator=rng).double()
    held = S.digest([products, model.state_dict()])
    once = fold(server.state, products, layers)
    kept = S.digest(once)
    twice = fold(once, products, layers)
    for path, layer in layers.items():
        change = dense(layer, products[f"{path}.fold.B"], products[f"{path}.fold.A"])
        torch.testing.assert_close(twice[f"{path}.base.weight"], layer.base.weight + 2 * change)
    assert S.digest([products, model.state_dict()]) == held and S.digest(once) == kept


def test_a_merged_layer_folds_into_its_frozen_weight():
    """`frozen`, not what stands in the base while it is merged."""
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=2)
    path, layer = pairs(model)[0]
    W = layer.base.weight.clone()
    with torch.no_grad():
        layer.B.fill_(1.0)
    layer.merge()
    products = {f"{path}.fold.A": torch.zeros_like(layer.A), f"{path}.fold.B": torch.zeros_like(layer.B)}
    assert torch.equal(fold({}, products, {path: layer})[f"{path}.base.weight"], W)


def test_new_pairs_differ_from_seed_to_seed_and_from_the_start_of_any_run():
    models = [
        prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", seed=seed, rank=2) for seed in range(4)
    ]
    layers, path = dict(adapters(models[0])), pairs(models[0])[0][0]
    starts = [trainable(model)[f"{path}.A"] for model in models]
    starts += [fresh(trainable(models[0]), t, layers, seed)[f"{path}.A"] for seed in range(3) for t in (2, 3)]
    assert all(not torch.equal(starts[i], starts[j]) for i in range(len(starts)) for j in range(i))
    assert RunConfig(method="flora", seed=3).row.rule.seed == 3
    assert [term.seed for term in RunConfig(method="feddg", seed=4).row.objective] == [4]


def test_layers_without_a_pair_in_the_state_do_not_begin_anew():
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=2)
    layers, state = dict(adapters(model)), trainable(model)
    path = pairs(model)[0][0]
    only = {name: value for name, value in state.items() if name.startswith("head") or name.startswith(f"{path}.")}
    assert fresh(only, 2, layers).keys() == {f"{path}.A", f"{path}.B"}
    assert fresh({f"{path}.A": only[f"{path}.A"]}, 2, layers) == {}
