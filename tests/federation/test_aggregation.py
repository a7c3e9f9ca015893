"""Aggregation error: 0 where the lemma says so, and the covariance formula elsewhere."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora_mini import state as S
from fedlora_mini.adapters import LoRA, adapters, keys, load_state, prepare, trainable
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.federation import METHODS, Update
from fedlora_mini.federation.aggregation import (
    AggregationError,
    Stack,
    aggregation_error,
    masked,
    mean,
    padded,
    residual,
    svd,
    truncate,
)
from fedlora_mini.federation.aggregation.error import FEW
from fedlora_mini.federation.aggregation.pairs import Pair, product_norm, stacked
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.models import build


@pytest.fixture(scope="module")
def setting():
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=3).double()
    torch.manual_seed(0)
    start = {name: torch.randn_like(value) for name, value in trainable(model).items()}
    clients = [{name: value + torch.randn_like(value) for name, value in start.items()} for _ in range(3)]
    return model, start, clients, keys(model, list(start))


def error(setting, names, private=lambda name: False):
    model, start, clients, _ = setting
    updates = [Update(k, S.pick(c, names.__contains__), float(k + 1)) for k, c in enumerate(clients)]
    before = S.pick(start, names.__contains__)
    return aggregation_error(model, start, start | mean(before, updates), updates, private)


def test_averaging_one_factor_is_exact(setting):
    _, start, _, _ = setting
    for factor in ("A", "B"):
        names = {name for name in start if name.endswith(f".{factor}")}
        assert error(setting, names) == pytest.approx(0, abs=1e-12)


def test_averaging_both_factors_loses_their_covariance(setting):
    """||sum_k p_k (B_k - B̄)(A_k - Ā)||_F / ||sum_k p_k B_k A_k||_F, over all low-rank layers."""
    _, start, clients, table = setting
    p = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    lost = kept = 0.0
    for path in {key.path for key in table.values() if key.factor == "A"}:
        A, B = (torch.stack([c[f"{path}.{f}"] for c in clients]) for f in "AB")
        A_bar, B_bar = torch.tensordot(p, A, 1), torch.tensordot(p, B, 1)
        lost += torch.einsum("k,kmr,krn->mn", p, B - B_bar, A - A_bar).square().sum().item()
        kept += torch.einsum("k,kmr,krn->mn", p, B, A).square().sum().item()
    assert error(setting, set(start)) == pytest.approx((lost / kept) ** 0.5, rel=1e-10)


def test_the_sign_of_the_covariance_is_minus(setting):
    """B̄Ā = sum p BA - Cov, not plus."""
    _, _, clients, _ = setting
    p = torch.full((3,), 1 / 3, dtype=torch.float64)
    path = "encoder.patch"
    A, B = (torch.stack([c[f"{path}.{f}"] for c in clients]) for f in "AB")
    A_bar, B_bar = torch.tensordot(p, A, 1), torch.tensordot(p, B, 1)
    products = torch.einsum("k,kmr,krn->mn", p, B, A)
    covariance = torch.einsum("k,kmr,krn->mn", p, B - B_bar, A - A_bar)
    assert torch.allclose(B_bar @ A_bar, products - covariance, rtol=1e-10)
    assert not torch.allclose(B_bar @ A_bar, products + covariance)


def test_layers_with_a_private_factor_have_no_common_update(setting):
    _, start, _, _ = setting
    assert error(setting, {n for n in start if n.endswith(".A")}, private=lambda n: n.endswith(".B")) is None


def dense_error(setting, rule, updates):
    """The definition, with every ΔW in full."""
    model, start, _, table = setting
    after = start | rule(start, updates)
    p = [u.weight / sum(u.weight for u in updates) for u in updates]
    lost = kept = 0.0
    for path in {key.path for key in table.values() if key.factor == "A"}:
        scale = model.get_submodule(path).scaling
        whole = sum(
            p_k * scale * u.state[f"{path}.B"] @ u.state[f"{path}.A"] for p_k, u in zip(p, updates, strict=True)
        )
        new = scale * after[f"{path}.B"] @ after[f"{path}.A"]
        if f"{path}.fold.A" in after:
            new = new + scale * after[f"{path}.fold.B"] @ after[f"{path}.fold.A"]
        lost += (whole - new).square().sum().item()
        kept += whole.square().sum().item()
    return aggregation_error(model, start, after, updates, lambda name: False), (lost / kept) ** 0.5


@pytest.fixture(scope="module")
def scaled():
    """The same with alpha = 5 at rank 3, where s = 5/3; B starts at zero, as in FLoRA's rounds."""
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=3, alpha=5.0).double()
    torch.manual_seed(1)
    start = {n: torch.randn_like(v) * (not n.endswith(".B")) for n, v in trainable(model).items()}
    clients = [{name: value + torch.randn_like(value) for name, value in start.items()} for _ in range(3)]
    return model, start, clients, keys(model, list(start))


CASES = [(rule, (3, 3, 3)) for rule in (mean, padded, svd, Stack(), residual)]
CASES += [(rule, (1, 3, 2)) for rule in (padded, svd, Stack())]


@pytest.mark.parametrize(("rule", "ranks"), CASES)
def test_the_error_of_a_rule_is_that_of_the_definition(scaled, rule, ranks):
    """What is folded into W_0 counts as part of the update; client ranks may be unequal."""
    updates = [Update(k, truncate(c, r), k + 1.0) for k, (c, r) in enumerate(zip(scaled[2], ranks, strict=True))]
    found, expected = dense_error(scaled, rule, updates)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found < 1e-12 if rule in (Stack(), residual) else found > 0.01


def hidden(client, start, seed):
    """A client's message that keeps about half of its entries, and its model as the server is told of it."""
    rng = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(value.shape, generator=rng) < 0.5 for name, value in client.items()}
    sent = {name: torch.where(masks[name], value, 0.0) for name, value in client.items()}
    told = {name: torch.where(masks[name], value, start[name]) for name, value in client.items()}
    return sent | {f"{name}~mask": mask.to(torch.uint8) for name, mask in masks.items()}, told


def test_entries_that_clients_keep_stand_at_the_start(setting):
    """The products by hand, with every ΔW in full: a zero behind a mask is no value."""
    model, start, clients, table = setting
    messages = [hidden(client, start, seed) for seed, client in enumerate(clients)]
    updates = [Update(k, sent, k + 1.0) for k, (sent, _) in enumerate(messages)]
    after, lost, kept = start | masked(start, updates), 0.0, 0.0
    for path in {key.path for key in table.values() if key.factor == "A"}:
        whole = sum((k + 1) / 6 * told[f"{path}.B"] @ told[f"{path}.A"] for k, (_, told) in enumerate(messages))
        lost += (whole - after[f"{path}.B"] @ after[f"{path}.A"]).square().sum().item()
        kept += whole.square().sum().item()
    found = aggregation_error(model, start, after, updates, lambda name: False)
    assert found == pytest.approx((lost / kept) ** 0.5, rel=1e-9) and found > 0.01


def test_of_a_mask_that_all_clients_have_the_mean_loses_the_covariance_alone(setting):
    """None if one factor is common; what nobody sends is on both sides the server's."""
    model, start, clients, _ = setting
    common = [c | S.pick(clients[0], lambda name: name.endswith(".A")) for c in clients]
    for states, exact in ((common, True), (clients, False)):
        told = [hidden(client, start, 0) for client in states]
        updates = [Update(k, sent, k + 1.0) for k, (sent, _) in enumerate(told)]
        plain = [Update(k, state, k + 1.0) for k, (_, state) in enumerate(told)]
        errors = [
            aggregation_error(model, start, start | rule(start, each), each, lambda name: False)
            for rule, each in ((masked, updates), (mean, plain))
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-9, abs=1e-12)
        assert (errors[0] < 1e-12) == exact


def thin_floats(error):
    return {path: sum(P.numel() + Q.numel() for _, P, Q in held) for path, held in error.thin.items()}


@pytest.mark.parametrize(("rule", "ranks"), [(mean, (3, 3)), (svd, (1, 3)), (Stack(), (2, 3)), (residual, (3, 3))])
def test_of_many_clients_the_error_is_the_same_and_its_memory_stays(scaled, rule, ranks):
    """Beyond FEW clients thin factors give way to the mean update, where they are larger than it."""
    model, start, clients, _ = scaled
    rng = torch.Generator().manual_seed(3)
    many = [{n: v + torch.randn(v.shape, generator=rng) for n, v in clients[k % 3].items()} for k in range(60)]
    updates = [Update(k, truncate(c, ranks[k % 2]), k % 5 + 1.0) for k, c in enumerate(many)]
    found, expected = dense_error(scaled, rule, updates)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)
    error, held = AggregationError(model, start, lambda name: False), []
    for update in updates:
        error.add(update)
        held.append(thin_floats(error))
    for path, adapter in adapters(model):
        if path in error.own:
            m, n = matrix_shape(adapter.base)
            assert max(each[path] for each in held) <= max(m * n, FEW * 3 * (m + n))
    assert error.sums, "some layers have more factors than entries"


def test_of_few_clients_the_error_is_that_of_their_stacked_factors_to_the_last_bit(setting):
    """What is stored of runs with few clients can be had again."""
    model, start, clients, _ = setting
    updates = [Update(k, clients[k % 3], k + 1.0) for k in range(FEW)]
    after, total, lost, kept = start | mean(start, updates), sum(u.weight for u in updates), 0.0, 0.0
    new = pairs(model, after)
    for path in new:
        terms = [Pair(u.weight / total, *pairs(model, u.state)[path]) for u in updates]
        lost += product_norm(*stacked([*terms, Pair(-1.0, *new[path])])) ** 2
        kept += product_norm(*stacked(terms)) ** 2
    assert aggregation_error(model, start, after, updates, lambda name: False) == (lost / kept) ** 0.5


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, value.numel() if isinstance(value, torch.Tensor) else 0)
        return out


def test_the_error_of_low_rank_layers_forms_no_update():
    m, n, r, K = 90, 80, 2, 3
    model = nn.Sequential(LoRA(nn.Linear(n, m), rank=r))
    torch.manual_seed(0)
    start, *clients = [{name: torch.randn_like(v) for name, v in trainable(model).items()} for _ in range(K + 1)]
    updates = [Update(k, c, 1.0) for k, c in enumerate(clients)]
    with Largest() as largest:
        assert aggregation_error(model, start, residual(start, updates), updates, lambda name: False) < 1e-6
    assert 0 < largest.numel <= (2 * K + 1) * r * m < m * n


@pytest.mark.parametrize("row", ["arena", "dora", "alore"])
def test_the_error_of_other_adapters_is_that_of_their_own_update(row):
    """By ΔW itself where it is no product, and thin with v in the pair where it is."""
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), row).double()
    torch.manual_seed(2)
    start = {name: value + 0.3 * torch.randn_like(value) for name, value in trainable(model).items()}
    clients = [{name: value + 0.3 * torch.randn_like(value) for name, value in start.items()} for _ in range(3)]
    updates = [Update(k, c, k + 1.0) for k, c in enumerate(clients)]
    after, lost, kept = mean(start, updates), 0.0, 0.0
    for path, adapter in adapters(model):
        if adapter.linear:
            continue

        def delta(state, path=path, adapter=adapter):
            load_state(model, S.pick(state, lambda n: n.startswith(f"{path}.")))
            return adapter.delta().detach()

        whole = sum((k + 1) / 6 * delta(c) for k, c in enumerate(clients))
        lost += (whole - delta(after)).square().sum().item()
        kept += whole.square().sum().item()
    found = aggregation_error(model, start, after, updates, lambda name: False)
    assert found == pytest.approx((lost / kept) ** 0.5, rel=1e-9) and found > 0


def test_the_mean_of_equal_clients_is_the_client(setting):
    _, start, clients, _ = setting
    updates = [Update(k, clients[0], float(k + 1)) for k in range(4)]
    for name, value in mean(start, updates).items():
        assert torch.allclose(value, clients[0][name], rtol=1e-14)


def test_every_row_of_the_table_names_things_that_exist(setting):
    from fedlora_mini.adapters import ADAPTERS

    _, _, _, table = setting
    for name, row in METHODS.items():
        assert row.adapter in ADAPTERS, name
        assert row.title and row.shared.label and row.schedule.label
        if row.adapter == "lora":
            assert any(row.schedule(key, 1, 1, 1) for key in table.values()), f"{name} trains nothing"
