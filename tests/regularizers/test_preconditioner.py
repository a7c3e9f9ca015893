"""Riemannian preconditioning: against explicit inverses, and free of the gauge in which BA is written."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.base import keys, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import only
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.preconditioner import Riemannian


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(term, gradient, A, B):
    """`gradient_` on one layer."""
    layer = torch.nn.Linear(A.shape[1], B.shape[0])
    context = Context(1, 1, {}, {}, 0.1, layers={"P": LoRA(layer, len(A))})
    term.gradient_(gradient, {"P.A": A, "P.B": B}, context)
    return gradient


def test_it_is_the_formula_with_explicit_inverses():
    A, B, gA, gB = draw(3, 7), draw(5, 3, seed=1), draw(3, 7, seed=2), draw(5, 3, seed=3)
    out = applied(Riemannian(1e-3), {"P.A": gA.clone(), "P.B": gB.clone()}, A, B)
    I = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(out["P.A"], torch.linalg.inv(B.T @ B + 1e-3 * I) @ gA, rtol=1e-9)
    assert torch.allclose(out["P.B"], gB @ torch.linalg.inv(A @ A.T + 1e-3 * I), rtol=1e-9)


@pytest.mark.parametrize("preconditioned", [True, False])
def test_only_the_preconditioned_step_of_BA_is_free_of_the_gauge(preconditioned):
    """(A, B) and (R⁻¹A, BR) are the same W: to first order the new W must be the same too."""
    G, A, B, R = draw(5, 7), draw(3, 7, seed=1), draw(5, 3, seed=2), draw(3, 3, seed=3)
    moves = []
    for a, b in ((A, B), (torch.linalg.inv(R) @ A, B @ R)):
        gradient = {"P.A": b.T @ G, "P.B": G @ a.T}
        if preconditioned:
            gradient = applied(Riemannian(1e-13), gradient, a, b)
        moves.append(gradient["P.B"] @ a + b @ gradient["P.A"])
    apart = float((moves[0] - moves[1]).norm() / moves[0].norm())
    assert apart < 1e-7 if preconditioned else apart > 0.1


def test_the_step_of_BA_is_the_sum_of_two_projections():
    G, A, B = draw(5, 7), draw(3, 7, seed=1), draw(5, 3, seed=2)
    out = applied(Riemannian(1e-13), {"P.A": B.T @ G, "P.B": G @ A.T}, A, B)
    rows, columns = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    assert torch.allclose(out["P.B"] @ A + B @ out["P.A"], G @ rows + columns @ G, rtol=1e-7)


def test_at_the_start_and_for_a_singular_gram_matrix_all_stays_finite():
    A, B = draw(3, 7), torch.zeros(5, 3, dtype=torch.float64)
    out = applied(Riemannian(), {"P.A": torch.zeros(3, 7), "P.B": draw(5, 3, seed=1).float()}, A.float(), B.float())
    assert torch.equal(out["P.A"], torch.zeros(3, 7)) and S.finite(out)
    G = draw(5, 7, seed=2).float()
    for seed in range(10):  # rank one, and ε is below single precision's last digit
        flat = 100 * (draw(5, 1, seed=seed) @ draw(1, 3, seed=seed + 10)).float()
        assert S.finite(applied(Riemannian(), {"P.A": flat.T @ G}, A.float(), flat))


def test_a_factor_that_stands_still_is_left_out(adapted, fit):
    model = adapted(LoRA, rank=2, noise=0.1)
    start = trainable(model)
    [end] = fit(model, Riemannian(), schedule=only("B"), steps=1, optimiser="sgd")
    for name in start:
        assert torch.equal(start[name], end[name]) == name.endswith(".A")


def test_a_step_of_sgd_in_training_is_the_scaled_step(adapted, fit):
    model = adapted(LoRA, torch.float64, noise=0.1, rank=2)
    start = trainable(model)
    [plain], [scaled] = (fit(model, *terms, steps=1, optimiser="sgd", lr=0.1) for terms in ((), (Riemannian(1e-2),)))
    I = 1e-2 * torch.eye(2, dtype=torch.float64)
    for path in {key.path for key in keys(model, list(start)).values()}:
        A, B = start[f"{path}.A"], start[f"{path}.B"]
        expected = torch.linalg.inv(B.T @ B + I) @ (plain[f"{path}.A"] - A)
        assert torch.allclose(scaled[f"{path}.A"] - A, expected, rtol=1e-8, atol=1e-15)
        expected = (plain[f"{path}.B"] - B) @ torch.linalg.inv(A @ A.T + I)
        assert torch.allclose(scaled[f"{path}.B"] - B, expected, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_grouped_clients_end_like_sequential_ones_and_always_alike(adapted, fit, optimiser):
    model = adapted(LoRA, torch.float64, rank=2)
    ends = [fit(model, Riemannian(1e-2), clients=2, grouped=g, optimiser=optimiser) for g in (False, True, True)]
    assert S.digest(ends[1]) == S.digest(ends[2])
    for one, other in zip(ends[0], ends[1], strict=True):
        assert S.norm(S.sub(one, other)) < 1e-7 * S.norm(one)


def test_errors(adapted, fit):
    with pytest.raises(FedloraError, match="eps must be positive"):
        Riemannian(0)
    with pytest.raises(FedloraError, match=r"needs layers adapted by LoRA; adapters here: Diagonal"):
        fit(adapted(Diagonal, rank=2), Riemannian())
