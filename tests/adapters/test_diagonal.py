"""B diag(v) A: a sum of rank-one pieces, LoRA to the bit at v = 1, and what is left after pruning (card 4.5)."""

import pytest
import torch
from torch import nn

from fedlora_mini.adapters import adapters, inject, merge, prepare, trainable, unmerge
from fedlora_mini.adapters.base import delta_of, freeze
from fedlora_mini.adapters.diagonal import STARTS, Diagonal, prune
from fedlora_mini.adapters.io import TENSORS, load, save
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, count, stack

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "tokens": (lambda: nn.Linear(5, 6, bias=False), (4, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding="same"), (4, 4, 4, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 4, 3, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def on(layer, rank=3, dtype=torch.float64, **options):
    make, shape = LAYERS[layer]
    g = torch.Generator().manual_seed(0)
    return Diagonal(make().to(dtype), rank, generator=g, **options), torch.randn(shape, generator=g).to(dtype)


@every_layer
def test_promises(layer, oracle):
    oracle.every_promise(*on(layer, alpha=5.0))


@every_layer
def test_delta_is_a_sum_of_rank_one_pieces(layer, oracle):
    module, _ = on(layer, alpha=5.0)
    oracle.randomise(module)
    pieces = [module.v[i] * torch.outer(module.B[:, i], module.A[i]) for i in range(3)]
    assert oracle.close(module.delta(), 5.0 / 3 * to_weight(module.base, sum(pieces)))
    alone = []
    for i in range(3):
        kept = {"v": torch.where(torch.arange(3) == i, module.v.detach(), 0.0)}
        alone.append(delta_of(module, kept))
    assert oracle.close(sum(alone), module.delta())


@every_layer
@pytest.mark.parametrize("start", ["unit", "gate"])
def test_a_direction_at_zero_gives_nothing(layer, start, oracle):
    """v = 0 is the base to the bit; v_i = 0 is the adapter without direction i."""
    module, x = on(layer, dtype=torch.float32, start=start)
    oracle.randomise(module)
    module.v.data.zero_()
    assert torch.equal(module(x), module.base(x)) and not module.delta().any()
    module.v.data[1] = 2.0
    one = Diagonal(module.base, 1, 1.0)
    one.A.data, one.v.data, one.B.data = module.A.data[1:2], module.v.data[1:2], module.B.data[:, 1:2]
    assert oracle.close(module(x), one(x), 1e-6)


@every_layer
def test_with_v_at_one_it_is_lora_to_the_bit(layer):
    """Output and the gradients of A and B, with s = 7/3 and in single precision; the starts are the same draw."""
    module, x = on(layer, dtype=torch.float32, alpha=7.0)
    lora = LoRA(module.base, 3, 7.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.A, lora.A) and torch.equal(module.B, lora.B) and (module.v == 1).all()
    B = torch.randn(module.B.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for adapter in (module, lora):
        adapter.B.data.copy_(B)
        y = adapter(x)
        gradients.append(
            [y.detach(), adapter.delta().detach(), *torch.autograd.grad(y.tanh().sum(), (adapter.A, adapter.B))]
        )
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_gradient_of_v_is_the_form_of_the_gradient_of_w(oracle):
    """dL/dv_i = s b_iᵀ G a_i, G = dL/dW: card 4.1."""
    module, x = on("tokens", alpha=5.0)
    oracle.randomise(module)
    W = (module.base.weight + module.delta()).detach().requires_grad_()
    (G,) = torch.autograd.grad((x @ W.T).tanh().sum(), W)
    (found,) = torch.autograd.grad(module(x).tanh().sum(), module.v)
    expected = torch.stack([5.0 / 3 * module.B[:, i] @ G @ module.A[i] for i in range(3)])
    assert oracle.close(found, expected)


def test_starts():
    m, n, r = 40, 300, 64
    drawn = {name: start(m, n, r, torch.Generator().manual_seed(0)) for name, start in STARTS.items()}
    assert all([t.shape for t in parts] == [(r, n), (r,), (m, r)] for parts in drawn.values())
    for name in ("lora", "gate"):
        A, _, B = drawn[name]
        assert not B.any() and 0.99 * n**-0.5 < A.abs().max() <= n**-0.5
    assert (drawn["lora"][1] == 1).all()
    assert abs(drawn["gate"][1].mean()) < 4 / r**0.5 and abs(drawn["gate"][1].std() - 1) < 4 / (2 * r) ** 0.5
    A, v, B = drawn["small"]
    assert not v.any() and A.std() == pytest.approx(0.02, rel=0.05) and B.std() == pytest.approx(0.02, rel=0.05)
    A, v, B = drawn["unit"]
    assert not v.any() and torch.allclose(A.norm(dim=1), torch.ones(r)) and torch.allclose(B.norm(dim=0), torch.ones(r))
    again = STARTS["unit"](m, n, r, torch.Generator().manual_seed(0))
    other = STARTS["unit"](m, n, r, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], A) and not torch.equal(other[0], A)


@pytest.mark.parametrize("layer", ["tokens", "conv2d", "transposed"])
def test_delta_with_a_group_axis(layer, oracle):
    module, _ = on(layer, alpha=5.0)
    states = [clone(trainable(oracle.randomise(module, seed))) for seed in range(3)]
    stacked = delta_of(module, stack(states))
    for g, state in enumerate(states):
        assert oracle.close(stacked[g], delta_of(module, state))
    for name in states[0]:
        mixed = delta_of(module, states[0] | {name: stack(states)[name]})
        assert oracle.close(mixed[2], delta_of(module, states[0] | {name: states[2][name]}))


def test_count():
    assert count(trainable(Diagonal(nn.Linear(20, 12), 3))) == 3 + 3 * (20 + 12)


def test_refusals():
    with pytest.raises(FedloraError, match="rank must be at least 1, got 0"):
        Diagonal(nn.Linear(4, 6), 0)
    with pytest.raises(FedloraError, match=r"unknown start 'unti'.*Did you mean 'unit'"):
        Diagonal(nn.Linear(4, 6), start="unti")
    with pytest.raises(FedloraError, match="no low-rank form for Embedding"):
        Diagonal(nn.Embedding(4, 6))


@pytest.mark.parametrize("name", ["minisam", "unet"])
def test_inside_networks(name, oracle, tmp_path):
    options = dict(d=16, depth=1, stem=8, width=8) if name == "minisam" else dict(features=(4, 8, 8))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()

    def make(layer, generator):
        return Diagonal(layer, 2, start="unit", generator=generator)

    oracle.in_a_network(zoo.build(name, 2, **options), make, layers, x, tmp_path)


# ---------------------------------------------------------------- pruning

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build():
    return zoo.build("minisam", 2, d=32, depth=1, stem=8, width=8)


def arena(rank=8, alpha=None):
    """Random factors, as after training, in the adapters of the table's row."""
    model = prepare(build(), "arena", rank=rank, alpha=alpha).eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return model


def cut(model, kept):
    """v_i = 0, in places -0, but for `kept(path)` directions of every layer, which are not the first ones."""
    for path, adapter in adapters(model):
        if isinstance(adapter, Diagonal):
            adapter.v.data[: adapter.rank - kept(path)] = torch.tensor(-0.0 if kept(path) % 2 else 0.0)
    return model


def few(path):
    return {"encoder.stem": 0, "encoder.blocks.0.qkv": 5, "decoder.mix2": 0, "decoder.up1": 8}.get(path, 2)


def nowhere(path):
    return 0


def size(folder):
    return (folder / TENSORS).stat().st_size


@pytest.mark.parametrize("alpha", [None, 20.0])  # s = 1 and 2.5
@pytest.mark.parametrize("kept", [few, nowhere])
def test_a_pruned_adapter_gives_the_same_from_a_smaller_file(kept, alpha, oracle, tmp_path):
    model = cut(arena(alpha=alpha), kept)
    expected, before = model(X), count(trainable(model))
    save(model, tmp_path / "whole")
    pruned = prune(model)
    assert oracle.close(pruned(X), expected, 1e-6)
    found = {path: a.rank for path, a in adapters(pruned) if isinstance(a, Diagonal)}
    plain = build()
    bodies = {path for path, module in plain.named_modules() if layers(path, module) and path != "head"}
    assert found == {path: kept(path) for path in bodies if kept(path)}
    assert all((a.v != 0).all() for _, a in adapters(pruned) if isinstance(a, Diagonal))
    save(pruned, tmp_path / "pruned")
    fewer = 4 * (before - count(trainable(pruned)))  # bytes; what is left of the files' difference are their headers
    assert size(tmp_path / "whole") - size(tmp_path / "pruned") >= fewer > 0
    loaded = load(build(), tmp_path / "pruned").eval()
    assert torch.equal(loaded(X), pruned(X))
    assert {path: a.config() for path, a in adapters(loaded)} == {path: a.config() for path, a in adapters(pruned)}
    assert oracle.close(merge(loaded)(X), expected, 1e-5)
    with pytest.raises(FedloraError, match="the model has"):  # it is another adapter now
        load(arena(alpha=alpha), tmp_path / "pruned")


def test_nothing_is_left_of_an_adapter_without_directions():
    """Rank 0 everywhere: every layer but the head is the frozen one itself, and trains nothing."""
    model = prune(cut(arena(), nowhere))
    plain = freeze(build())
    assert [path for path, _ in adapters(model)] == ["head"]
    assert {name.partition(".")[0] for name in trainable(model)} == {"head"}
    nn.init.zeros_(model.head.D)
    nn.init.zeros_(model.head.d)
    assert torch.equal(model(X), plain(X))


def test_without_zeros_pruning_changes_nothing():
    model = arena()
    before = dict(adapters(model))
    assert all(adapter is before[path] for path, adapter in adapters(prune(model)))
    twice = prune(prune(cut(model, few)))
    assert twice is model and {a.rank for _, a in adapters(model) if isinstance(a, Diagonal)} == {2, 5, 8}


def test_other_adapters_are_left_alone():
    model = freeze(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    inject(model, lambda layer, g: Diagonal(layer, 2, start="small", generator=g), lambda path, _: path == "0")
    inject(model, lambda layer, g: LoRA(layer, 2, generator=g), lambda path, _: path == "1")  # B = 0, yet no v
    prune(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is LoRA


def test_pruning_draws_no_random_numbers():
    model = cut(arena(), few)
    before = torch.get_rng_state()
    prune(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_merged_model_is_not_pruned():
    model = merge(cut(arena(), few))
    with pytest.raises(FedloraError, match=r"'encoder\.stem' is merged; call unmerge"):
        prune(model)
    assert len(dict(adapters(prune(unmerge(model))))) > 1
