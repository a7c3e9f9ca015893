"""Aggregation error: 0 where the lemma says so, and the covariance formula elsewhere."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.federation import METHODS, Update
from fedlora_mini.federation.aggregation import aggregation_error, mean
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
            assert any(row.schedule(key, 1, 1) for key in table.values()), f"{name} trains nothing"
