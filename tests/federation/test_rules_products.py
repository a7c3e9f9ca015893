"""The rules on products B A against dense matrices, and the client's side of unequal ranks."""

import numpy as np
import pytest
import torch
from scipy import optimize

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import Update
from fedlora_mini.federation.aggregation import (
    Fair,
    Stack,
    mean,
    padded,
    residual,
    self_pruned_rank,
    svd,
    tail,
    truncate,
)
from fedlora_mini.federation.aggregation.fair import objective

LAYERS = {"encoder.qkv": (7, 5), "decoder.conv": (4, 9)}  # m, n
RANK, WEIGHTS = 3, (3.0, 1.0, 2.0, 5.0, 4.0)


def state(seed, rank=RANK):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"head.D": (2, 3)}
    for path, (m, n) in LAYERS.items():
        shapes |= {f"{path}.A": (rank, n), f"{path}.B": (m, rank)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def clients(ranks=(RANK,) * 5):
    return [Update(k, state(k, rank), WEIGHTS[k]) for k, rank in enumerate(ranks)]


def product(out, path):
    """The change of W that a result stands for."""
    pairs = [(out[f"{p}.B"], out[f"{p}.A"]) for p in (path, f"{path}.fold") if f"{p}.A" in out]
    return sum(B @ A for B, A in pairs)


def mean_product(updates, path):
    p = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    return sum(p_k * u.state[f"{path}.B"] @ u.state[f"{path}.A"] for p_k, u in zip(p, updates, strict=True))


def without_B(updates):
    return [Update(u.client, {n: v * (not n.endswith(".B")) for n, v in u.state.items()}, u.weight) for u in updates]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# Products: stacked, padded, svd, residual, fair


@pytest.mark.parametrize(("rule", "ranks"), [(Stack(), (3,) * 5), (Stack(), (1, 2, 3, 3, 2)), (residual, (3,) * 5)])
def test_stack_and_residual_are_exact(rule, ranks):
    updates = clients(ranks=ranks)
    out = rule(state(9), updates)
    for path in LAYERS:
        torch.testing.assert_close(product(out, path), mean_product(updates, path), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out["head.D"], sum(u.weight / 15 * u.state["head.D"] for u in updates))


def test_stack_returns_no_factors_and_concatenates():
    updates = clients(ranks=(1, 2, 3))
    out = Stack()(state(9), updates)
    path = "encoder.qkv"
    assert {n for n in out if n.startswith(path)} == {f"{path}.fold.A", f"{path}.fold.B"}
    assert torch.equal(out[f"{path}.fold.A"], torch.cat([u.state[f"{path}.A"] for u in updates]))
    torch.testing.assert_close(out[f"{path}.fold.B"][:, 1:3], updates[1].state[f"{path}.B"] * 1 / 6)


def test_residual_is_the_mean_and_a_thin_remainder():
    updates = clients()[:2]
    out, plain = residual(state(9), updates), mean(state(9), updates)
    assert_same({n: out[n] for n in plain}, plain)
    assert all(len(out[f"{path}.fold.A"]) == RANK for path in LAYERS)  # (K - 1) r
    shared = [
        Update(u.client, u.state | S.pick(updates[0].state, lambda n: n.endswith(".A")), u.weight) for u in updates
    ]
    same = [Update(u.client, updates[0].state, u.weight) for u in updates]
    for lossless in (same, shared):
        assert all(len(residual(state(9), lossless)[f"{path}.fold.A"]) == 0 for path in LAYERS)


def test_padded_weighs_by_the_norm_of_the_product():
    updates = clients(ranks=(1, 2, 3, 3, 2))
    out = padded(state(9), updates)
    for path, (m, n) in LAYERS.items():
        norms = [np.linalg.norm((u.state[f"{path}.B"] @ u.state[f"{path}.A"]).numpy()) for u in updates]
        A, B = np.zeros((RANK, n)), np.zeros((m, RANK))
        for norm, u in zip(norms, updates, strict=True):
            for i in range(len(u.state[f"{path}.A"])):
                A[i] += norm / sum(norms) * u.state[f"{path}.A"][i].numpy()
                B[:, i] += norm / sum(norms) * u.state[f"{path}.B"][:, i].numpy()
        np.testing.assert_allclose(out[f"{path}.A"].numpy(), A, rtol=1e-10)
        np.testing.assert_allclose(out[f"{path}.B"].numpy(), B, rtol=1e-10)
    head = sum(u.weight / 15 * u.state["head.D"] for u in updates)
    torch.testing.assert_close(out["head.D"], head)


def test_padded_gives_no_weight_to_a_client_that_has_not_moved():
    updates = clients()
    out = padded(state(9), [*without_B(updates[:1]), updates[1]])
    torch.testing.assert_close(out["encoder.qkv.A"], updates[1].state["encoder.qkv.A"])


def test_padded_counts_images_where_no_product_has_a_size():
    updates = without_B(clients())
    assert_same(padded(state(9), updates), mean(state(9), updates))


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3, 3), (1, 2, 3, 3, 2)], ids=str)
def test_svd_is_the_best_fit_of_the_servers_rank(ranks):
    updates = clients(ranks=ranks)
    out = svd(state(9), updates)
    for path in LAYERS:
        U, sigma, Vh = torch.linalg.svd(mean_product(updates, path), full_matrices=False)
        best = U[:, :RANK] * sigma[:RANK] @ Vh[:RANK]
        torch.testing.assert_close(product(out, path), best, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(out[f"{path}.B"].norm(dim=0), sigma[:RANK].sqrt())
        torch.testing.assert_close(out[f"{path}.A"].norm(dim=1), sigma[:RANK].sqrt())
        smaller = truncate(out, 2)  # a client of rank 2 has its own best fit
        torch.testing.assert_close(product(smaller, path), U[:, :2] * sigma[:2] @ Vh[:2], rtol=1e-9, atol=1e-11)


def test_svd_of_a_mean_of_lower_rank_is_filled_with_zeros():
    [update] = clients(ranks=(1,))
    out = svd(state(9), [update])
    assert all(out[f"{path}.A"].shape[0] == RANK and not out[f"{path}.A"][1:].any() for path in LAYERS)


def dense_fair(updates, path):
    """M = sum_k p_k B_k A_k, B̄ and Ā, densely."""
    plain = mean(None, updates)
    return mean_product(updates, path).numpy(), plain[f"{path}.B"].numpy(), plain[f"{path}.A"].numpy()


def test_fair_closed_is_the_minimum_of_the_ridge():
    updates, lam = clients(), 0.3
    out = Fair(lam)(state(9), updates)
    for path in LAYERS:
        M, B, A = dense_fair(updates, path)
        found = out[f"{path}.B"].numpy() - B

        def ridge(x, M=M, B=B, A=A):
            X = x.reshape(B.shape)
            return ((M - (B + X) @ A) ** 2).sum() + lam * (X**2).sum()

        best = optimize.minimize(ridge, np.zeros(B.size), tol=1e-12)
        np.testing.assert_allclose(found.ravel(), best.x, atol=1e-5)
        assert torch.equal(out[f"{path}.A"], mean(None, updates)[f"{path}.A"])


@pytest.mark.parametrize("lam", [0.01, 0.2, 3.0])
def test_fair_optimised_is_the_minimum_of_the_papers_objective(lam):
    updates = clients()
    out = Fair(lam, solve="optimised")(state(9), updates)
    for path in LAYERS:
        M, B, A = dense_fair(updates, path)

        def loss(x, M=M, B=B, A=A):
            W = (B + x.reshape(B.shape)) @ A
            return 1 - (M * W).sum() / np.linalg.norm(M) / np.linalg.norm(W) + lam * np.linalg.norm(x)

        rng = np.random.default_rng(0)
        starts = [1e-3 * rng.standard_normal(B.size), rng.standard_normal(B.size)]
        best = min([loss(0 * starts[0]), *(optimize.minimize(loss, x, tol=1e-10).fun for x in starts)])
        assert loss((out[f"{path}.B"].numpy() - B).ravel()) < best + 1e-7


def test_fair_thin_objective_is_the_dense_one():
    updates = clients()
    M, B, A = (torch.from_numpy(x) for x in dense_fair(updates, "encoder.qkv"))
    X = torch.randn(B.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W = (B + X) @ A
    dense = 1 - torch.cosine_similarity(M.flatten(), W.flatten(), dim=0) + 0.1 * X.norm()
    torch.testing.assert_close(objective(X, M @ A.T, A @ A.T, B, float(M.norm()), 0.1), dense)


@pytest.mark.parametrize("solve", ["closed", "optimised"])
def test_fair_turns_the_product_towards_the_mean_product(solve):
    updates = clients()
    plain, out, held = mean(None, updates), Fair(solve=solve)(None, updates), Fair(1e6, solve)(None, updates)
    for path in LAYERS:
        M = mean_product(updates, path)

        def cos(state, path=path, M=M):
            return float((M * product(state, path)).sum() / M.norm() / product(state, path).norm())

        assert cos(out) > cos(plain) + 0.01
        limit = 1e-4 if solve == "closed" else 1e-13  # the norm, unlike its square, holds ΔB at 0 itself
        torch.testing.assert_close(held[f"{path}.B"], plain[f"{path}.B"], atol=limit, rtol=0)


def test_fair_without_a_product_is_the_mean():
    updates = without_B(clients())
    assert_same(Fair(solve="optimised")(None, updates), mean(None, updates))


def test_fair_refuses():
    with pytest.raises(FedloraError, match=r"unknown solver 'close'.*Did you mean 'closed'"):
        Fair(solve="close")
    with pytest.raises(FedloraError, match="lam must be positive"):
        Fair(lam=0.0)


# The client's side of HetLoRA


def test_truncate_keeps_the_first_directions_and_all_that_is_no_pair():
    aside = {
        "~~m/encoder.qkv.A": torch.ones(RANK, 5),
        "encoder.qkv.fold.A": torch.ones(4, 5),
        "head.D": torch.ones(2, 3),
    }
    whole = state(0) | aside
    cut = truncate(whole, 2)
    for path in LAYERS:
        assert torch.equal(cut[f"{path}.A"], whole[f"{path}.A"][:2])
        assert torch.equal(cut[f"{path}.B"], whole[f"{path}.B"][:, :2])
    assert S.digest({name: cut[name] for name in aside}) == S.digest(aside)
    assert S.digest(truncate(whole, 8)) == S.digest(whole)
    with pytest.raises(FedloraError, match="at least 1"):
        truncate(whole, 0)


def test_a_client_prunes_its_rank_when_the_tail_has_shrunk():
    before = state(0, rank=8)
    quiet = {n: v.clone() for n, v in before.items()}
    for path in LAYERS:
        quiet[f"{path}.A"][6:] *= 0.5
        quiet[f"{path}.B"][:, :6] *= 9  # what is no tail does not count
    assert self_pruned_rank(before, quiet, gamma=0.75) == 6
    assert self_pruned_rank(quiet, before, gamma=0.75) == 8
    assert self_pruned_rank(before, quiet, gamma=0.7) == 8  # the tail beyond floor(5.6) has grown
    assert self_pruned_rank(state(0, rank=1), S.scale(state(0, rank=1), 0.1)) == 1
    with pytest.raises(FedloraError, match="gamma"):
        self_pruned_rank(before, quiet, gamma=1.0)


def test_the_tail_is_a_penalty_on_the_last_directions_only():
    leaves = {n: v.clone().requires_grad_() for n, v in state(0).items()}
    value = tail(leaves, 2)
    value.backward()
    by_hand = sum(float(state(0)[f"{p}.A"][2].norm() * state(0)[f"{p}.B"][:, 2].norm()) for p in LAYERS)
    assert value.item() == pytest.approx(by_hand)
    assert leaves["encoder.qkv.A"].grad[2].any() and not leaves["encoder.qkv.A"].grad[:2].any()
