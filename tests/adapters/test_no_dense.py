"""No training step forms an m x n matrix, but for the rows that are listed: every new tensor is measured."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora_mini.adapters import ADAPTERS, Dense, call, keys, prepare, trainable
from fedlora_mini.adapters.bottleneck import AdaptFormer, Houlsby
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.dora import DoRA, EDoRA
from fedlora_mini.adapters.dual import Dual, Fused
from fedlora_mini.adapters.gate import IA3
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.adapters.hydra import Experts, Hydra, WithRest
from fedlora_mini.adapters.kronecker import ALoRE
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.mixture import MixtureSARA
from fedlora_mini.adapters.prilora import PRILoRA
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import everything
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models.minisam import Block
from fedlora_mini.regularizers.companions import companions

D = 512
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "adapters.py"


class NewMemory(TorchDispatchMode):
    """Keeps every tensor that an operation, forward or backward, puts into memory of its own; views are none."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (place := t.untyped_storage().data_ptr()) not in self.known:
                self.made.setdefault(place, t)  # held, so that no two share an address
        return out

    def large(self, size):
        """Those with room for `size` numbers or more; an expanded view has room for what it views."""
        return [t for t in self.made.values() if t.untyped_storage().nbytes() >= size * t.element_size()]


# ---------------------------------------------------------------- one layer

LAYERS = {
    "linear": (lambda: nn.Linear(D, D), (2, 3, D)),
    "conv": (lambda: nn.Conv2d(D // 4, D, (2, 2), padding=1), (2, D // 4, 2, 2)),
    "pointwise": (lambda: nn.Conv2d(D, D, 1), (2, D, 2, 2)),
    "grouped": (lambda: nn.Conv1d(D, D, 4, groups=4, padding=1), (2, D, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(D // 4, D, 2, stride=2), (2, D // 4, 2, 2)),
}
WRAPS = (LoRA, Diagonal, DoRA, EDoRA, ALoRE, MixtureSARA, PRILoRA, Houlsby, AdaptFormer, IA3)
WRAPS += (Dual, Fused, Hydra, WithRest, Experts)
COPIES = {DoRA, EDoRA}  # W_0 of a transposed convolution, put into the order of a matrix


def adapted(wrap, layer, **options):
    module, shape = LAYERS[layer][0](), LAYERS[layer][1]
    g = torch.Generator().manual_seed(0)
    adapter = wrap(module, **options, generator=g)
    for p in adapter.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return adapter, torch.randn(shape, generator=g)


def known(module):
    return [*module.parameters(), *module.buffers()]


def is_copy(t, W):
    """Whether t holds W's numbers in some order."""
    t, W = t.detach().flatten(), W.detach().flatten()
    return len(t) == len(W) and bool(t.sum().isclose(W.sum(), atol=1e-2)) and torch.equal(t.sort()[0], W.sort()[0])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_an_adapter_reads_w_and_forms_nothing_of_its_size(wrap, layer):
    options = {} if wrap is IA3 else {"rank": 4}
    adapter, x = adapted(wrap, layer, **options)
    x.requires_grad_()  # the gradient goes on to the layers before
    with NewMemory(*known(adapter), x) as memory:
        adapter(x).square().sum().backward()
    made = memory.large(D * D)
    assert all(is_copy(t, adapter.base.weight) for t in made)
    assert bool(made) == (wrap in COPIES and layer == "transposed")
    assert len(memory.made) > 10


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_nor_do_per_sample_gradients(wrap, layer):
    adapter, x = adapted(wrap, layer, **({} if wrap is IA3 else {"rank": 4}))
    state = trainable(adapter)
    with NewMemory(*known(adapter), *state.values(), x) as memory:
        per_sample_gradients(adapter, state, lambda y, _: y.square().flatten(1).sum(1), x, x)
    assert all(is_copy(t, adapter.base.weight) for t in memory.large(D * D))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_measurement_sees_what_is_formed(layer):
    """Dense's gradient, the dense ΔW, W_0 + ΔW: so that an empty list means something."""
    dense, x = adapted(Dense, layer)
    with NewMemory(*known(dense), x) as memory:
        dense(x).square().sum().backward()
    assert memory.large(D * D)
    lora, x = adapted(LoRA, layer, rank=4)
    with NewMemory(*known(lora), x) as memory:
        lora.delta()
    assert any(not is_copy(t, lora.base.weight) for t in memory.large(D * D))
    with NewMemory(*known(lora), x) as memory:
        lora.base.weight.detach().expand(3, *lora.base.weight.shape).transpose(1, 2)  # views
        torch.ones(1, 1).expand(D, D)
    assert not memory.large(D * D)


# ---------------------------------------------------------------- every row, a step with its companions


class Wide(nn.Module):
    """(N, D, T) -> logits (N, 2, 2 T): a place for every row, every layer of the body at least D x D."""

    def __init__(self):
        super().__init__()
        self.encoder = Block(D, 8, 1)
        self.decoder = nn.Sequential(nn.ConvTranspose1d(D, D, 2, stride=2), nn.GroupNorm(4, D), nn.Conv1d(D, D, 1))
        self.head = nn.Conv1d(D, 2, 1)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x.mT).mT))


AT_ONCE = {"adalora": {"every": 1}, "aroma": {"check": 1, "longest": 1}, "prilora": {"every": 1}}  # not now and then


def listed(name):
    """A table of the benchmark, whose last column it is: so that it says what is measured here."""
    body = ast.parse(BENCHMARK.read_text()).body
    [table] = [node.value for node in body if isinstance(node, ast.Assign) and node.targets[0].id == name]
    return ast.literal_eval(table)


@pytest.mark.parametrize("row", ADAPTERS)
def test_a_training_step_of_a_row_forms_a_dense_matrix_only_where_the_benchmark_says_so(row):
    torch.manual_seed(0)
    small = {"rank": 4, "largest": 4, "first": 4, "last": 4, "tokens": 2}
    model = prepare(Wide(), row, **{name: value for name, value in small.items() if name in ADAPTERS[row].options})
    start = trainable(model)
    x = torch.randn(2, D, 4)
    y = (x[:, 0].repeat_interleave(2, 1) > 0).to(torch.uint8)
    method = Method("", row, everything, objective=companions(row, **AT_ONCE.get(row, {})))
    memory = NewMemory(*known(model), *start.values(), x, y)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d))]
    with memory:
        [end], _ = train(model, method, keys(model, list(start)), [start], lambda step: (x, y), Budget(steps=2), 1)
    copied = [t for t in memory.large(D * D) if any(is_copy(t, W) for W in weights)]
    formed = [t for t in memory.large(D * D) if not any(t is copy for copy in copied)]
    assert bool(formed) == (row in listed("DENSE")), [tuple(t.shape) for t in formed]
    assert bool(copied) == (row in listed("COPIES")) or formed
    with torch.no_grad():
        assert segmentation_loss(call(model, end, x), y).isfinite().all()


def test_the_listed_rows_exist():
    assert listed("DENSE").keys() | listed("COPIES").keys() <= ADAPTERS.keys()
    assert not listed("DENSE").keys() & listed("COPIES").keys()
