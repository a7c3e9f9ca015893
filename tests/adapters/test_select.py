"""SubLoRA's selection: the derivatives, the projection, submodularity and the greedy choice, all by enumeration."""

import itertools

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import call, freeze, inject, load_state, region, trainable
from fedlora_mini.adapters.diagonal import Diagonal, prune
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.adapters.select import (
    directions,
    greedy,
    project_submodular,
    select_directions,
    singular_directions,
    v_hessian,
)
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def problem(d, seed, minimum=False):
    """g, H, v in float64; at a minimum g = 0 and H is positive definite."""
    g = torch.Generator().manual_seed(seed)
    root, v, slope = (torch.randn(*shape, generator=g).double() for shape in ((d, d), (d,), (d,)))
    if minimum:
        return torch.zeros(d).double(), root @ root.T, v
    return slope, root + root.T, v


def taylor(g, H, v, kept):
    """The second-order change of the loss when all others become zero, term by term."""
    gone = [i for i in range(len(v)) if i not in kept]
    linear = sum(-float(g[i] * v[i]) for i in gone)
    return linear + 0.5 * sum(float(H[i, j] * v[i] * v[j]) for i in gone for j in gone)


def subsets(d):
    return [frozenset(s) for k in range(d + 1) for s in itertools.combinations(range(d), k)]


def projected(H, v):
    """H whose Q = diag(v) H diag(v) is projected."""
    return project_submodular(v[:, None] * H * v) / (v[:, None] * v)


def saving(g, H, v):
    """f(S) = ΔL(all gone) - ΔL(all but S gone), for every S."""
    none = taylor(g, H, v, frozenset())
    return {s: none - taylor(g, H, v, s) for s in subsets(len(v))}


def diminishing(f, d):
    """f(S + i) - f(S) >= f(T + i) - f(T) for all S within T and i outside T: the definition, by enumeration."""
    return all(
        f[s | {i}] - f[s] >= f[t | {i}] - f[t] - 1e-9
        for t in subsets(d)
        for s in subsets(d)
        if s <= t
        for i in range(d)
        if i not in t
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_projected_objective_is_submodular_and_the_plain_one_is_not(seed):
    g, H, v = problem(5, seed)
    assert diminishing(saving(g, projected(H, v), v), 5)
    assert not diminishing(saving(g, H, v), 5)


def test_the_opposite_sign_would_not_do():
    g, H, v = problem(4, 0)
    Q = -project_submodular(-(v[:, None] * H * v))  # off-diagonal entries <= 0
    assert not diminishing(saving(g, Q / (v[:, None] * v), v), 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_projection_is_the_nearest_matrix_of_its_class(seed):
    """Against projected gradient descent on the distance with the sign constraint as a square, and against samples."""
    _, Q, _ = problem(5, seed)
    best, off = project_submodular(Q), ~torch.eye(5, dtype=torch.bool)
    assert (best[off] >= 0).all() and torch.equal(best, best.T) and torch.equal(project_submodular(best), best)
    root = torch.ones(5, 5).double().requires_grad_()  # X = root² off the diagonal, root on it
    optimiser = torch.optim.LBFGS([root], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def matrix():
        X = torch.where(off, root.square(), root)
        return (X + X.T) / 2

    def distance():
        optimiser.zero_grad()
        value = (matrix() - Q).square().sum()
        value.backward()
        return value

    optimiser.step(distance)
    assert torch.allclose(matrix(), best, atol=1e-4)
    least = (best - Q).norm()
    for _ in range(200):
        other = best + 0.1 * torch.randn(5, 5, dtype=torch.float64)
        other = project_submodular((other + other.T) / 2)
        assert (other - Q).norm() >= least


@pytest.mark.parametrize("seed", range(20))
def test_greedy_saves_at_least_1_minus_1_over_e_of_the_best(seed):
    g, H, v = problem(7, seed, minimum=True)
    f = saving(g, projected(H, v), v)
    assert all(f[s | {i}] >= f[s] - 1e-9 for s in f for i in range(7))  # monotone, so the guarantee holds
    for budget in range(1, 8):
        kept = frozenset(greedy(g, H, v, budget).nonzero().flatten().tolist())
        best = max(value for s, value in f.items() if len(s) <= budget)
        assert len(kept) <= budget
        assert f[kept] >= (1 - 1 / torch.e) * best


@pytest.mark.parametrize("seed", range(10))
def test_greedy_adds_what_saves_most_until_nothing_does(seed):
    """Also away from a minimum: step by step against all choices of the next direction."""
    g, H, v = problem(6, seed)
    f, kept = saving(g, projected(H, v), v), frozenset()
    for budget in range(1, 7):
        gains = {i: f[kept | {i}] - f[kept] for i in range(6) if i not in kept}
        best = max(gains, key=gains.__getitem__)
        if gains[best] > 0:
            kept |= {best}
        assert frozenset(greedy(g, H, v, budget).nonzero().flatten().tolist()) == kept
    assert kept


def test_without_interaction_greedy_is_exact():
    g, H, v = problem(6, 1)
    H = H.diag().diag()
    f = saving(g, H, v)
    for budget in range(7):
        kept = frozenset(greedy(g, H, v, budget).nonzero().flatten().tolist())
        assert f[kept] == pytest.approx(max(value for s, value in f.items() if len(s) <= budget))


# in a network


def squares(logits, y):
    """½ ||f(x) - y||² per image."""
    return 0.5 * (logits - y).flatten(1).square().sum(1)


class Pair(nn.Module):
    """One adapted linear layer with W_0 = 0: f(x) = B diag(v) A x."""

    def __init__(self, A, v, B):
        super().__init__()
        self.encoder = Diagonal(nn.Linear(A.shape[1], B.shape[0], bias=False), len(v))
        with torch.no_grad():
            self.encoder.base.weight.zero_()
        load_state(self, {"encoder.A": A, "encoder.v": v, "encoder.B": B})

    def forward(self, x):
        return self.encoder(x)


def twins():
    """Two outputs, each made by two equal directions; those of the first are larger. The model is at its minimum."""
    A = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    model = Pair(A, torch.tensor([1.0, 0.95, 0.9, 0.85]), A.T.contiguous())
    x = torch.eye(2)
    with torch.no_grad():
        return model, [(x, model(x))]


def test_it_beats_magnitude_where_directions_stand_in_for_each_other():
    """Keep two of four: magnitude keeps both twins of the first output and none of the second."""
    model, batches = twins()
    state = trainable(model)
    [(x, y)] = batches
    v = state["encoder.v"]
    g, H = v_hessian(model, state, batches, squares)
    kept = greedy(g, H, v.double(), 2)
    assert kept.tolist() == [True, False, True, False]

    def loss(v):
        return float(squares(call(model, state | {"encoder.v": v}, x), y).mean())

    pairs = [torch.tensor(s) for s in itertools.product((0.0, 1.0), repeat=4) if sum(s) == 2]
    best, by_size = min(loss(v * s) for s in pairs), loss(torch.tensor([1.0, 0.95, 0.0, 0.0]))
    assert loss(v * kept) == best < 0.6 * by_size
    alone = greedy(g, H.diag().diag(), v.double(), 2)
    assert alone.tolist() == [True, True, False, False]  # curvature without interaction does not see it either


def test_among_singular_directions_twins_are_one():
    """So that two of four lose nothing."""
    model, batches = twins()
    [(x, y)] = batches
    chosen = select_directions(model, trainable(model), batches, squares, rank=2)
    assert chosen["encoder.v"].tolist() == pytest.approx([1.95, 1.75, 0.0, 0.0], abs=1e-5)
    assert torch.allclose(call(model, chosen, x), y, atol=1e-5)


def network(rank=2, dtype=torch.float64):
    """MiniSAM with Diagonal on every layer but the head, away from its start, and two batches of different size."""
    g = torch.Generator().manual_seed(0)
    model = freeze(build("minisam", 2, d=8, depth=1, stem=4, width=4)).to(dtype)

    def body(path, module):
        return isinstance(module, LAYERS) and region(model, path) != "head"

    inject(model, lambda layer, rng: Diagonal(layer, rank, start="unit", generator=rng), body)
    state = {n: t + 0.3 * torch.randn(t.shape, generator=g).to(dtype) for n, t in trainable(model).items()}
    x = torch.rand(3, 3, 8, 8, generator=g).to(dtype)
    y = (x.mean(1) > 0.5).to(torch.uint8)
    return model, state, [(x[:2], y[:2]), (x[2:], y[2:])]


def test_gradient_and_hessian_are_those_of_finite_differences():
    """Through attention, convolutions and norms; central differences of the loss alone."""
    model, state, batches = network(rank=1)
    names = directions(model)
    assert names == [n for n in state if n.endswith(".v")]
    v = torch.cat([state[n] for n in names])

    def value(v):
        seen = state | {n: part for n, part in zip(names, v.split(1), strict=True)}
        with torch.no_grad():
            return float(sum(segmentation_loss(call(model, seen, x), y).sum() for x, y in batches)) / 3

    g, H = v_hessian(model, state, batches, segmentation_loss)
    h, e = 1e-4, torch.eye(len(v), dtype=v.dtype)
    slope = torch.tensor([(value(v + h * a) - value(v - h * a)) / (2 * h) for a in e])
    assert torch.allclose(g, slope.double(), atol=1e-7)
    for i, j in itertools.product(range(len(v)), range(0, len(v), 3)):
        a, b = h * e[i], h * e[j]
        curve = (value(v + a + b) - value(v + a - b) - value(v - a + b) + value(v - a - b)) / (4 * h * h)
        assert float(H[i, j]) == pytest.approx(curve, abs=2e-6)
    assert torch.equal(H, H.T)


def test_the_selected_state_differs_in_zeros_of_v_alone_and_can_be_pruned():
    model, state, batches = network(dtype=torch.float32)
    before = S.clone(state)
    rotated = singular_directions(model, state)
    chosen = select_directions(model, state, batches, segmentation_loss, rank=1)
    names = directions(model)
    kept = {n: chosen[n] != 0 for n in names}
    assert 0 < sum(int(mask.sum()) for mask in kept.values()) <= len(names)
    assert S.digest(state) == S.digest(before)
    for name, value in chosen.items():
        assert torch.equal(value, rotated[name] * kept[name] if name in kept else rotated[name])
    [x, _], _ = batches
    expected = call(model, chosen, x)
    load_state(model, chosen)
    assert torch.allclose(prune(model)(x), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_singular_directions_are_the_same_update_with_orthonormal_factors(rank):
    """Also where r exceeds a layer's m or n: what is left over is zero."""
    model, state, [(x, _), _] = network(rank=rank)
    rotated = singular_directions(model, state)
    assert torch.allclose(call(model, rotated, x), call(model, state, x), atol=1e-10)
    for name in directions(model):
        path, v = name.removesuffix(".v"), rotated[name]
        dense = (state[f"{path}.B"] * state[name]) @ state[f"{path}.A"]
        sigma = torch.linalg.svdvals(dense)
        k = min(*dense.shape, rank)
        assert torch.allclose(v[:k], sigma[:k]) and not v[k:].any()
        U, Vh, I = rotated[f"{path}.B"][:, :k], rotated[f"{path}.A"][:k], torch.eye(k, dtype=v.dtype)
        assert torch.allclose(U.mT @ U, I) and torch.allclose(Vh @ Vh.mT, I)


def test_the_same_twice():
    model, state, batches = network(dtype=torch.float32)
    first, second = (select_directions(model, state, batches, segmentation_loss, rank=1) for _ in range(2))
    assert S.digest(first) == S.digest(second)


def test_errors():
    model, state, batches = network()
    with pytest.raises(FedloraError, match="at least one batch"):
        v_hessian(model, state, [], segmentation_loss)
    plain = freeze(build("minisam", 2, d=8, depth=1, stem=4, width=4))
    inject(plain, lambda layer, rng: LoRA(layer, generator=rng))
    with pytest.raises(FedloraError, match="no layer adapted by Diagonal"):
        select_directions(plain, trainable(plain), batches, segmentation_loss, rank=1)
