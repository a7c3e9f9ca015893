"""What every row of ADAPTERS promises on a network: it trains, touches nothing else, merges, survives a round trip."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import ADAPTERS, Dense, adapters, call, load_state, merge, prepare, trainable, unmerge
from fedlora_mini.adapters.base import freeze, region
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.adapters.io import load, save
from fedlora_mini.adapters.ops import LAYERS, matrix_shape
from fedlora_mini.adapters.registry import Recipe
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import zoo

NETWORKS = {
    "minisam": dict(d=32, depth=2, stem=8, width=8, grid=8),
    "unet": {},
    "attention_unet": {},  # has batch statistics
}


@pytest.fixture(params=[n if n == "minisam" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def network(request):
    return lambda: zoo.build(request.param, classes=2, **NETWORKS[request.param])


@pytest.fixture(params=ADAPTERS)
def name(request):
    return request.param


def batch(n=4, side=32):
    """Bright discs on noise: learnable in a few steps."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, side, side, generator=g) * 0.3
    grid = torch.arange(side)
    centre = torch.randint(8, side - 8, (n, 2, 1, 1), generator=g)
    y = ((grid[:, None] - centre[:, 0]) ** 2 + (grid[None] - centre[:, 1]) ** 2 < 30).to(torch.uint8)
    return x + 0.5 * y[:, None], y


def prepared(network, name, seed=0, **options):
    """The network with the row's adapters; a row that has no place in it must say so, and is then done with."""
    model = network()
    try:
        return prepare(model, name, seed, **options)
    except FedloraError as error:
        assert "has no place" in str(error) and name in HOMELESS.get(type(model).__name__, ())
        pytest.skip(f"{type(model).__name__} {error}")


HOMELESS = {"UNet": ("prompt",), "AttentionUnet": ("prompt",)}  # rows that a network has no place for


def fit(model, steps=8, lr=1e-2):
    x, y = batch()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = segmentation_loss(model(x), y).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_it_trains_and_the_base_stays_as_it_was(network, name):
    model = prepared(network, name)
    before = frozen(model)
    losses = fit(model)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[n]) for n, value in before.items())
    assert len(before) or name == "full"


def test_what_is_trained(network, name):
    """The trained tensors are exactly the adapters' factors, and the model's own where the row says so."""
    model, recipe = prepared(network, name), ADAPTERS[name]
    wrapped = dict(adapters(model))
    for path, adapter in wrapped.items():
        own = {n.partition(".")[0] for n, p in adapter.named_parameters() if p.requires_grad}
        assert own <= set(adapter.factors), path
    outside = {n for n in trainable(model) if n.rpartition(".")[0] not in wrapped}
    assert recipe.grouped == (not outside)
    plain = network()
    layers = {p: m for p, m in plain.named_modules() if isinstance(m, LAYERS)}
    heads = {p for p in layers if region(plain, p) == "head"}
    if recipe.own is None:
        assert heads <= set(wrapped)
        assert all(type(wrapped[path]) is recipe.head.wrap for path in heads)
        assert (recipe.head.wrap is Dense) == (name != "lcfed")
        for path in set(wrapped) - heads:
            assert type(wrapped[path]) in {place.wrap for place in recipe.place}


def test_what_an_adapter_keeps_still_belongs_to_the_state_and_no_step_moves_it(network, name):
    model = prepared(network, name)
    still = {f"{path}.{factor}" for path, adapter in adapters(model) for factor in adapter.still}
    before = trainable(model)
    assert still < before.keys()
    fit(model, 2)
    after = trainable(model)
    for n in after:
        assert torch.equal(before[n], after[n]) or n not in still, n
    assert bool(still) == (name in ("fdlora", "fedalt", "lcfed"))


def test_lora_count(network):
    """sum of r (m + n) over encoder and decoder, and the head in full."""
    plain, r = network(), 3
    layers = {p: m for p, m in plain.named_modules() if isinstance(m, LAYERS)}
    expected = 0
    for path, layer in layers.items():
        head = region(plain, path) == "head"
        expected += sum(p.numel() for p in layer.parameters()) if head else r * sum(matrix_shape(layer))
    assert S.count(trainable(prepare(plain, "lora", rank=r))) == expected


def test_every_trained_tensor_gets_a_gradient(network, name):
    """Not one of them is beside the network: after a step away from the start no gradient is zero."""
    model = prepared(network, name)
    fit(model, 2)
    model.zero_grad()
    x, y = batch()
    segmentation_loss(model(x), y).sum().backward()
    for path, p in model.named_parameters():
        if p.requires_grad and not path.endswith("psi.0.conv.bias"):  # a norm follows that takes out its one number
            assert p.grad is not None and p.grad.abs().max() > 0, path


def test_merging(network, name):
    model = prepared(network, name)
    fit(model, 3)
    model.eval()
    x, _ = batch()
    weights, expected = S.clone(model.state_dict()), model(x)
    assert torch.allclose(merge(model)(x), expected, atol=1e-4)
    assert all(adapter.merged == adapter.merges for _, adapter in adapters(model))
    unmerge(model)
    assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())


def test_state_round_trip(network, name):
    model, other = prepared(network, name), prepared(network, name, seed=1)
    fit(model, 2)
    load_state(other, trainable(model))
    assert S.digest(trainable(other)) == S.digest(trainable(model))
    x, _ = batch()
    assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(FedloraError, match="has no tensor"):
        load_state(other, {"nowhere.A": torch.zeros(1)})
    some, value = next(iter(trainable(model).items()))
    with pytest.raises(FedloraError, match="has shape"):
        load_state(other, {some: value[..., None]})


def test_save_and_load(network, name, tmp_path):
    model = prepared(network, name)
    fit(model, 2)
    x, _ = batch()
    save(model, tmp_path)
    loaded = load(network(), tmp_path)
    assert S.digest(trainable(loaded)) == S.digest(trainable(model))
    assert loaded.recipe == name
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    again = load(prepared(network, name, seed=1), tmp_path)  # into a model that is adapted already
    assert torch.equal(again.eval()(x), model(x))


def test_per_sample_gradients_or_a_clear_refusal(network, name):
    """In double precision: in single, two ways to sum a convolution differ by more than an error would."""
    model, (x, y) = prepared(network, name), batch(3)
    fit(model, 2)
    model, x, state = model.double(), x.double(), trainable(model.double())
    if not ADAPTERS[name].grouped:
        with pytest.raises(FedloraError, match=r"cannot carry a group axis|mixes the samples of a batch"):
            per_sample_gradients(model, state, segmentation_loss, x, y)
        return
    found, _ = per_sample_gradients(model, state, segmentation_loss, x, y)
    for i in range(len(x)):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
        alone = segmentation_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        expected = dict(zip(leaves, torch.autograd.grad(alone, list(leaves.values())), strict=True))
        row = {n: g[i] for n, g in found.items()}
        assert S.norm(S.sub(row, expected)) < 1e-9 * S.norm(expected)


def test_the_same_seed_gives_the_same_start(network, name):
    first, second = (S.digest(trainable(prepared(network, name, seed=5))) for _ in range(2))
    assert first == second


def test_nothing_moves_at_the_start(network, name):
    """Before the first step the adapted network is the base: to the bit, except for the few that say otherwise."""
    x, _ = batch()
    model = prepared(network, name).eval()
    expected = freeze(network())(x)
    if all(adapter.starts_at_base for _, adapter in adapters(model)):
        assert torch.equal(model(x), expected)
    else:
        assert not torch.equal(model(x), expected)
        assert torch.allclose(model(x), expected, atol=0.2)


def test_options_are_taken_and_unknown_ones_are_refused(network, name):
    for option in ADAPTERS[name].options & {"rank", "alpha"}:
        model = prepared(network, name, **{option: 2})
        assert any(adapter.config().get(option) == 2 for _, adapter in adapters(model))
    with pytest.raises(FedloraError, match=f"unknown option of adapter '{name}' 'rnak'"):
        prepare(network(), name, rnak=3)


def test_dtype_is_kept(network, name):
    model = prepared(lambda: network().double(), name)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    x, _ = batch()
    assert model.eval()(x.double()).dtype == torch.float64


def test_rows_say_what_they_are(name):
    recipe = ADAPTERS[name]
    assert isinstance(recipe, Recipe) and recipe.summary
    assert all(place.wrap.factors for place in recipe.place)
