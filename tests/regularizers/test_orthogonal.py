"""AdaLoRA's and PEGO's penalties against loops over dense matrices."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import matrix_shape
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers import Context, Diversity, Orthogonality

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "conv": lambda: nn.Conv2d(3, 5, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(wrap, rank, layers=("linear", "conv")):
    adapters = {name: wrap(LAYERS[name]().double(), rank) for name in layers}
    state, keys = {}, {}
    for k, (path, adapter) in enumerate(adapters.items()):
        m, n = matrix_shape(adapter.base)
        adapter.base.weight.data = draw(*adapter.base.weight.shape, seed=50 + k)
        shapes = {"A": (rank, n), "v": (rank,), "B": (m, rank)}
        for role in adapter.factors:
            state[f"{path}.{role}"] = draw(*shapes[role], seed=len(state))
            keys[f"{path}.{role}"] = Key(path, role, "encoder", "linear")
    return state, Context(1, 1, {}, keys, 0.1, layers=adapters)


def agrees_with_finite_differences(term, state, context):
    names = list(state)

    def value(*tensors):
        return term.penalty(dict(zip(names, tensors, strict=True)), context)

    return torch.autograd.gradcheck(value, tuple(state[name].requires_grad_() for name in names))


@pytest.mark.parametrize("wrap", [LoRA, Diagonal])
@pytest.mark.parametrize("squared", [False, True])
def test_orthogonality_is_the_mean_distance_of_all_gram_matrices_from_the_identity(wrap, squared):
    state, c = setting(wrap, 3)
    total = 0.0
    for path in c.layers:
        A, B = state[f"{path}.A"], state[f"{path}.B"]
        for rows in (A, B.T):
            square = sum((float(rows[i] @ rows[j]) - (i == j)) ** 2 for i in range(3) for j in range(3))
            total += square if squared else square**0.5
    term = Orthogonality(0.1, squared)
    assert term.penalty(state, c).item() == pytest.approx(0.1 * total / 4, rel=1e-12)
    assert agrees_with_finite_differences(term, state, c)


def test_orthonormal_factors_cost_nothing_and_have_no_gradient():
    state, c = setting(LoRA, 3, ("linear",))
    state = {"linear.A": torch.eye(3, 7).double(), "linear.B": torch.eye(5, 3).double()}
    value = Orthogonality().penalty({name: t.requires_grad_() for name, t in state.items()}, c)
    assert value == 0
    assert not any(g.any() for g in torch.autograd.grad(value, list(state.values())))


def test_descent_makes_factors_orthonormal(adapted, fit):
    term, ends = Orthogonality(50.0, squared=True), []
    for terms in ((), (term,)):
        [end] = fit(adapted(Diagonal, rank=2, start="unit"), *terms, steps=30, optimiser="sgd")
        gaps = [end[n] @ end[n].T - torch.eye(2) for n in end if n.endswith(".A")]
        ends.append(max(float(gap.norm()) for gap in gaps))
    assert ends[1] < 0.1 * ends[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_diversity_is_the_double_sum_over_blocks(layer):
    """W_0 as the dense map from unfolded inputs: found by feeding the layer's own ΔW with unit matrices."""
    state, c = setting(LoRA, 6, (layer,))
    A, adapter = state[f"{layer}.A"].clone(), c.layers[layer].requires_grad_(False)
    m, n = matrix_shape(adapter.base)
    W = torch.zeros(m, n, dtype=torch.float64)
    for j in range(m):  # ΔW = e_j e_kᵀ picks W_0's entry (j, k)
        for k in range(n):
            adapter.B.data, adapter.A.data = torch.zeros(m, 6).double(), torch.zeros(6, n).double()
            adapter.B.data[j, 0] = adapter.A.data[0, k] = 1.0
            W[j, k] = (adapter.delta() * adapter.base.weight).sum()
    blocks = [A[2 * i : 2 * i + 2] for i in range(3)]
    preserve = sum(float((block @ W.T).square().sum()) for block in blocks)
    diversify = sum(float((blocks[i] @ blocks[j].T).square().sum()) for i in range(3) for j in range(i + 1, 3))
    term = Diversity(3, preserve=0.7, diversify=0.3)
    assert term.penalty(state, c).item() == pytest.approx(0.7 * preserve + 0.3 * diversify, rel=1e-12)
    assert Diversity(1, 0.0, 1.0).penalty(state, c) == 0
    assert agrees_with_finite_differences(term, {f"{layer}.A": A}, c)


def test_diversity_sums_over_layers_and_leaves_b_alone():
    state, c = setting(LoRA, 4)
    total = sum(
        Diversity(2).penalty(state, Context(1, 1, {}, c.keys, 0.1, layers={path: layer}))
        for path, layer in c.layers.items()
    )
    value = Diversity(2).penalty({name: t.requires_grad_() for name, t in state.items()}, c)
    assert value.item() == pytest.approx(total.item())
    value.backward()
    assert all((t.grad is None) == name.endswith("B") for name, t in state.items())


def test_a_rank_that_does_not_split_into_blocks_is_named():
    state, c = setting(LoRA, 4, ("linear",))
    with pytest.raises(FedloraError, match="'linear' has rank 4, which does not split into 3 blocks"):
        Diversity(3).penalty(state, c)
    with pytest.raises(FedloraError, match="at least 1"):
        Diversity(0)
