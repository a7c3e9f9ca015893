"""M1-M4 against dense matrices, loops and NumPy; their values under chance against simulation."""

import numpy as np
import pytest
import torch

from fedlora_mini.adapters import LoRA
from fedlora_mini.adapters.base import Key, call, freeze, inject, region, trainable
from fedlora_mini.adapters.ops import LAYERS, to_weight
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.metrics.leakage import (
    changes,
    energy_null,
    explained_null,
    gradients_through,
    leak_cos2,
    leak_energy,
    leak_explained,
    principal_angles,
    shared_gradients,
    site_spread,
    split_half_spread,
    subspace_overlap,
    travelling,
)
from fedlora_mini.models import build
from fedlora_mini.thin import inner, norm2

M, N, R, K = 12, 9, 3, 4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(seed, m=M, n=N, r=R):
    return draw(m, r, seed=2 * seed), draw(r, n, seed=2 * seed + 1)


def product(pair):
    return (pair[0] @ pair[1]).numpy()


# ---------------------------------------------------------------- thin products


@pytest.mark.parametrize(("m", "n", "r1", "r2"), [(12, 9, 3, 3), (5, 20, 2, 4), (4, 3, 6, 1)])
def test_thin_inner_products_are_the_dense_ones(m, n, r1, r2):
    one, two = pair(1, m, n, r1), pair(2, m, n, r2)
    assert float(inner(*one, *two)) == pytest.approx((product(one) * product(two)).sum(), rel=1e-10)
    assert float(norm2(*one)) == pytest.approx(np.linalg.norm(product(one)) ** 2, rel=1e-10)


def test_thin_inner_products_broadcast_over_leading_axes():
    one, two = pair(1), [pair(k) for k in (2, 3)]
    B, A = (torch.stack(factors) for factors in zip(*two, strict=True))
    assert torch.allclose(inner(*one, B, A), torch.stack([inner(*one, *other) for other in two]))


def test_the_norm_of_a_product_that_cancels_has_a_root():
    b, a = draw(50, 1, dtype=torch.float32), draw(1, 40, seed=1, dtype=torch.float32)
    for seed in range(50):
        c = 1 + draw(1, seed=seed, dtype=torch.float32)
        square = norm2(torch.cat([b, c * b], 1), torch.cat([-c * a, a]))
        assert 0 <= square < 1e-4 * norm2(b, a)


# ---------------------------------------------------------------- who travels, and by what a layer changes


def test_layers_with_other_factors_and_the_head_have_no_private_factor():
    regions = {"e": "encoder", "d": "decoder", "h": "head", "v": "encoder"}
    keys = {f"{p}.{f}": Key(p, f, region, "linear") for p, region in regions.items() for f in "AB"}
    keys |= {"v.v": Key("v", "v", "encoder", "linear"), "n.weight": Key("n", "weight", "decoder", "norm")}
    assert travelling(keys) == {"e": "B", "d": "A"}
    assert travelling(keys, "A", "A") == {"e": "A", "d": "A"}


def test_a_change_is_shared_plus_private_plus_the_product_of_both():
    start, end = ({f"{p}.{f}": t for p in "ed" for f, t in zip("BA", pair(s), strict=True)} for s in (1, 2))
    for path, (shared, private) in changes(start, end, {"e": "B", "d": "A"}).items():
        B0, A0, B, A = (s[f"{path}.{f}"] for s in (start, end) for f in "BA")
        both = (B - B0) @ (A - A0)
        total = torch.as_tensor(product(shared) + product(private)) + both
        assert torch.allclose(total, B @ A - B0 @ A0)
        moved = (B - B0) @ A0 if path == "e" else B0 @ (A - A0)
        assert np.allclose(product(shared), moved)


# ---------------------------------------------------------------- M1, M1b


def lora(noise=0.3):
    model = freeze(build("minisam", 2, d=16, depth=1, stem=4, width=4)).double()

    def body(path, module):
        return isinstance(module, LAYERS) and region(model, path) != "head"

    inject(model, lambda layer, g: LoRA(layer, 2, alpha=3.0, generator=g), body)
    return model, {name: noise * draw(*v.shape, seed=k) for k, (name, v) in enumerate(trainable(model).items())}


def test_shared_gradients_are_g_times_the_private_factors_with_g_of_the_sites_own_model():
    """G by the chain rule: the dense gradient of every frozen weight at W_0 + s B A. Linear, conv and transposed."""
    model, state = lora()
    paths = sorted({name[:-2] for name in state})
    shared = {path: "BA"[k % 2] for k, path in enumerate(paths)}
    average = {name: draw(*value.shape, seed=99) for name, value in state.items()}
    x, y = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.randint(0, 2, (2, 16, 16))
    own, at_average = shared_gradients(model, state, average, shared, x, y)
    assert own.keys() == at_average.keys() == {f"{path}.{factor}" for path, factor in shared.items()}

    weights = {f"{path}.base.weight": model.get_submodule(path).base.weight.clone() for path in paths}
    weights = {name: W.requires_grad_() for name, W in weights.items()}
    loss = segmentation_loss(call(model, {**state, **weights}, x), y).mean()
    for (name, W), G in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
        path = name.removesuffix(".base.weight")
        layer, factor = model.get_submodule(path), shared[path]
        m, n = state[f"{path}.B"].shape[0], state[f"{path}.A"].shape[1]
        basis = torch.eye(m * n, dtype=torch.float64).reshape(m * n, m, n)
        dense = (to_weight(layer.base, basis) * G).flatten(1).sum(1).reshape(m, n)  # G as an m x n matrix
        for found, source in ((own, state), (at_average, average)):
            other = source[f"{path}.{'A' if factor == 'B' else 'B'}"]
            expected = 1.5 * (dense @ other.T if factor == "B" else other.T @ dense)
            assert torch.allclose(found[f"{path}.{factor}"], expected, rtol=1e-8, atol=1e-12), name
        assert W.shape == G.shape


def test_one_backward_pass_serves_the_private_factors_of_any_number_of_sites():
    model, state = lora()
    shared = {name[:-2]: "BA"[k % 2] for k, name in enumerate(sorted(state)[::2])}
    others = [{name: draw(*value.shape, seed=90 + k) for name, value in state.items()} for k in range(3)]
    x, y = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.randint(0, 2, (2, 16, 16))
    own, *through = gradients_through(model, state, others, shared, x, y)
    assert len(through) == 3
    for other, found in zip(others, through, strict=True):
        alone = shared_gradients(model, state, other, shared, x, y)
        for one, two in zip(alone, (own, found), strict=True):
            assert all(torch.allclose(one[name], two[name], rtol=1e-8) for name in one.keys() | two.keys())


def test_where_all_private_factors_are_equal_nothing_leaks():
    model, state = lora()
    shared = {name[:-2]: "B" for name in state}
    sites = []
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        x, y = torch.rand(2, 3, 16, 16, generator=g).double(), torch.randint(0, 2, (2, 16, 16), generator=g)
        sites.append(shared_gradients(model, state, state, shared, x, y))
    own, at_average = zip(*sites, strict=True)
    assert leak_energy(own, at_average, [1, 2, 3]) < 1e-20
    assert site_spread(own, [1, 2, 3]) > 1e-3


def rotations(theta, d, count, seed):
    """exp(θ S), S skew with eigenvalues of mean square 1: θ is the root mean square of the angles."""
    S = draw(count, d, d, seed=seed)
    return torch.linalg.matrix_exp(theta * (S - S.mT) / (2 * d) ** 0.5)


def gradients(G, A, p):
    """G_k A_kᵀ and G_k Āᵀ as one-tensor states."""
    mean = (p[:, None, None] * A).sum(0)
    return [{"B": g} for g in G @ A.mT], [{"B": g} for g in G @ mean.T]


def test_leak_energy_is_the_covariance_of_gradient_and_private_factor():
    G, A, p = draw(K, M, N), draw(K, R, N, seed=1), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    own, at_mean = gradients(G, A, p)
    G_mean, A_mean = ((p[:, None, None] * t).sum(0) for t in (G, A))
    leak = sum(p[k] * (G[k] - G_mean) @ (A[k] - A_mean).T for k in range(K))
    common = G_mean @ A_mean.T
    expected = leak.square().sum() / (leak.square().sum() + common.square().sum())
    assert leak_energy(own, at_mean, (10 * p).tolist()) == pytest.approx(float(expected), rel=1e-10)


def test_the_level_of_leak_energy_is_the_mean_over_the_ways_to_pass_the_private_factors_on():
    """Sites whose private factor has nothing to do with their gradient are at it; those where it has are above."""
    p, weights = torch.full((K,), 1 / K, dtype=torch.float64), [1.0] * K
    found = {"unrelated": [], "level": [], "own gradient": []}
    for seed in range(200):
        G, A = draw(K, M, N, seed=2 * seed), draw(K, R, N, seed=2 * seed + 1)
        pushes = [[{"B": g @ a.T} for a in A] for g in G]
        at_mean = gradients(G, A, p)[1]
        level = energy_null(pushes, at_mean, weights)
        dealt = [[pushes[k][(k + shift) % K] for k in range(K)] for shift in (1, 2, 3)]
        assert level == pytest.approx(np.mean([leak_energy(own, at_mean, weights) for own in dealt]))
        found["unrelated"].append(leak_energy([pushes[k][k] for k in range(K)], at_mean, weights))
        found["level"].append(level)
        tied = G[:, :R]  # A_k is a part of G_k
        own, at_mean = gradients(G, tied, p)
        level = energy_null([[{"B": g @ a.T} for a in tied] for g in G], at_mean, weights)
        found["own gradient"].append(leak_energy(own, at_mean, weights) - level)
    assert np.mean(found["unrelated"]) == pytest.approx(np.mean(found["level"]), abs=0.02)
    assert np.mean(found["own gradient"]) > 0.1
    same = [[{"B": G[k] @ A[0].T} for _ in range(K)] for k in range(K)]
    assert energy_null(same, [row[0] for row in same], weights) < 1e-20, "equal factors"


@pytest.mark.parametrize(("theta", "energy"), [(0.3, 0.01), (0.825, 0.41), (2.0, 0.98)])
def test_ideal_private_factors_leak_nothing_and_yet_m1_goes_to_one(theta, energy):
    """A_k = A R_kᵀ, G_k = G R_kᵀ, 12 sites: all push B by the same G Aᵀ. Chapter 11, M1."""
    found, p = [], torch.full((12,), 1 / 12, dtype=torch.float64)
    for seed in range(20):
        R = rotations(theta, 24, 12, seed)
        G, A = draw(16, 24, seed=100 + seed), draw(4, 24, seed=200 + seed)
        own, at_mean = gradients(G @ R.mT, A @ R.mT, p)
        assert site_spread(own, p.tolist()) < 1e-20
        found.append(leak_energy(own, at_mean, p.tolist()))
    assert np.mean(found) == pytest.approx(energy, abs=0.02)


def test_site_spread_is_the_loop_over_entries_and_ranges_from_agreement_to_cancellation():
    sites, p = [{"x": draw(3, 2, seed=k), "y": draw(4, seed=9 + k)} for k in range(K)], [0.1, 0.2, 0.3, 0.4]
    rows = np.array([torch.cat([t.flatten() for t in s.values()]).numpy() for s in sites])
    mean = np.average(rows, axis=0, weights=p)
    off = sum(q * ((row - mean) ** 2).sum() for q, row in zip(p, rows, strict=True))
    whole = sum(q * (row**2).sum() for q, row in zip(p, rows, strict=True))
    assert site_spread(sites, [3 * q for q in p]) == pytest.approx(off / whole, rel=1e-10)
    assert site_spread([sites[0]] * 3, [1, 2, 3]) < 1e-15
    assert site_spread([sites[0], {n: -v for n, v in sites[0].items()}], [1, 1]) == pytest.approx(1)
    assert site_spread([{"x": torch.zeros(2)}] * 2, [1, 1]) == 0


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [8, 1, 1, 1, 1]])
def test_sites_that_differ_by_sampling_alone_spread_as_their_halves_say(weights):
    """One mean for all sites, noise in every half: both sides have the same expectation."""
    signal, spread, null = 0.3 * draw(40), [], []
    for seed in range(300):
        halves = [[{"B": signal + draw(40, seed=20 * seed + 2 * k + h)} for k in range(5)] for h in range(2)]
        spread.append(site_spread([{"B": (a["B"] + b["B"]) / 2} for a, b in zip(*halves, strict=True)], weights))
        null.append(split_half_spread(*halves, weights))
    assert np.mean(null) == pytest.approx(np.mean(spread), rel=0.02)
    apart = [[{"B": half["B"] + 3 * draw(40, seed=k)} for k, half in enumerate(row)] for row in halves]
    whole = [{"B": (a["B"] + b["B"]) / 2} for a, b in zip(*apart, strict=True)]
    assert site_spread(whole, weights) > 5 * split_half_spread(*apart, weights)  # and it tells a difference


# ---------------------------------------------------------------- M2-M4


def test_leak_cos2_is_the_squared_cosine_of_the_dense_matrices():
    one, two = pair(1), pair(2, r=2)
    X, Y = product(one), product(two)
    expected = (X * Y).sum() ** 2 / ((X**2).sum() * (Y**2).sum())
    assert leak_cos2(one, two) == pytest.approx(expected, rel=1e-10)
    assert leak_cos2(one, (-2 * one[0], one[1])) == pytest.approx(1)
    assert leak_cos2(one, (torch.zeros(M, R), torch.ones(R, N))) == 0


def test_leak_explained_is_the_least_squares_fit_of_the_dense_matrices():
    shared, privates = pair(1), [pair(2 + k) for k in range(K)]
    X, y = np.stack([product(p).ravel() for p in privates], 1), product(shared).ravel()
    fit = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    assert leak_explained(shared, privates) == pytest.approx((fit**2).sum() / (y**2).sum(), rel=1e-8)
    sum_of_two = torch.cat([privates[0][0], privates[2][0]], 1), torch.cat([privates[0][1], privates[2][1]])
    assert leak_explained(sum_of_two, privates) == pytest.approx(1)
    repeated = [*privates, privates[0], (2 * privates[1][0], privates[1][1])]  # Γ is singular
    assert leak_explained(shared, repeated) == pytest.approx(leak_explained(shared, privates), rel=1e-8)
    assert leak_explained((torch.zeros(M, R), torch.ones(R, N)), privates) == 0


def test_leak_explained_grows_with_the_number_of_sites_and_stays_at_most_one():
    shared, privates = pair(1, 4, 3), [pair(2 + k, 4, 3) for k in range(15)]
    values = [leak_explained(shared, privates[:k]) for k in range(1, 16)]
    assert min(np.diff(values)) > -1e-12 and values[-1] == pytest.approx(1) and values[0] < 0.9


def test_chance_explains_a_share_of_k_in_mn():
    """Of unrelated matrices, and by the permutation null, which leaves Γ as it is."""
    g = torch.Generator().manual_seed(0)
    random = [leak_explained(pair(10 * s), [pair(10 * s + 1 + k) for k in range(K)]) for s in range(400)]
    assert np.mean(random) == pytest.approx(K / (M * N), rel=0.1)
    shared, privates = pair(1), [pair(1 + k) for k in range(K)]  # the first is the shared one itself
    assert leak_explained(shared, privates) == pytest.approx(1)
    null = explained_null(shared, [*privates, privates[0]], g, draws=1500)
    assert float(null.mean()) == pytest.approx(K / (M * N), rel=0.1)  # rank(Γ) = K, not K + 1
    assert float(null.max()) < 0.5


@pytest.mark.parametrize(("r1", "r2"), [(3, 3), (2, 4)])
def test_principal_angles_are_those_of_numpys_qr(r1, r2):
    F, G = draw(M, r1), draw(M, r2, seed=1)
    Q_s, Q_l = np.linalg.qr(F.numpy())[0], np.linalg.qr(G.numpy())[0]
    expected = np.linalg.svd(Q_s.T @ Q_l, compute_uv=False)
    assert np.allclose(principal_angles(F, G).numpy(), expected, atol=1e-12)
    assert subspace_overlap(F, G) == pytest.approx(np.linalg.norm(Q_s.T @ Q_l) ** 2 / min(r1, r2), rel=1e-10)


def test_the_overlap_is_one_for_a_subspace_zero_for_its_complement_and_blind_to_dead_columns():
    Q = torch.linalg.qr(draw(M, M))[0]
    F, mix = Q[:, :3], draw(3, 3, seed=1)
    assert subspace_overlap(F, F @ mix) == pytest.approx(1) and subspace_overlap(F, Q[:, 3:7]) < 1e-20
    dead = torch.cat([F[:, :2], torch.zeros(M, 1)], 1)  # QR would put an arbitrary direction there
    assert subspace_overlap(dead, Q[:, 2:5]) < 1e-20
    assert subspace_overlap(torch.zeros(M, 3), F) == 0


def test_random_subspaces_overlap_by_r_in_m():
    values = [subspace_overlap(draw(M, R, seed=s), draw(M, R, seed=1000 + s)) for s in range(400)]
    assert np.mean(values) == pytest.approx(R / M, rel=0.05) and 0 <= min(values) < max(values) <= 1
