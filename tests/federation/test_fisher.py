"""The diagonal Fisher information against one image, one pixel and one gradient at a time."""

import warnings

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, prepare, trainable
from fedlora_mini.adapters.features import statistic
from fedlora_mini.data import IGNORE, Split
from fedlora_mini.federation import fisher
from fedlora_mini.federation.fisher import diagonal_fisher, log_loss
from fedlora_mini.models import build
from fedlora_mini.models.zoo import MODELS

NETWORKS = {
    "minisam": {"d": 16, "depth": 1, "stem": 4, "width": 4},
    "unet": {"features": (4, 8, 8)},
    "attention_unet": {"features": (4, 8, 8)},  # with batch norm
}


def setting(network, adapter, images=3):
    """A model, a state away from its start, and data with pixels that nobody judges."""
    model = prepare(build(network, 3, **NETWORKS[network]), adapter).double()
    rng = torch.Generator().manual_seed(1)
    state = {
        name: value if statistic(name) else value + 0.1 * torch.randn(value.shape, generator=rng).double()
        for name, value in trainable(model).items()
    }
    x = torch.rand(images, 3, 16, 16, generator=rng).double()
    y = torch.randint(0, 3, (images, 16, 16), generator=rng).to(torch.uint8)
    y[:, :5] = IGNORE
    return model, state, Split(x, y)


def pixel_mean(logits, y):
    """-log p of the true class, pixel by pixel."""
    judged = [(i, j) for i in range(len(y)) for j in range(y.shape[1]) if y[i, j] != IGNORE]
    log_p = logits - logits.exp().sum(0).log()
    return -torch.stack([log_p[int(y[i, j]), i, j] for i, j in judged]).mean()


def gradient(model, state, split, rows):
    """Of the mean loss over these images, the model in evaluation."""
    model.eval()
    leaves = {n: v.clone().requires_grad_(not statistic(n)) for n, v in state.items()}
    moving = {n: v for n, v in leaves.items() if v.requires_grad}
    value = torch.stack(
        [pixel_mean(call(model, leaves, split.images[i : i + 1])[0], split.masks[i]) for i in rows]
    ).mean()
    return dict(zip(moving, torch.autograd.grad(value, list(moving.values())), strict=True))


def by_image(model, state, split, images):
    total = {}
    for i in range(images):
        for name, g in gradient(model, state, split, [i]).items():
            total[name] = total.get(name, 0.0) + g**2 / images
    return total


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_mean_of_squared_gradients_image_by_image(network, adapter):
    model, state, split = setting(network, adapter)
    found = diagonal_fisher(model, state, split)
    expected = by_image(model, state, split, 3)
    assert found.keys() == expected.keys() == {name for name in state if not statistic(name)}
    assert S.norm(S.sub(found, expected)) < 1e-10 * S.norm(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("adapter", "way"), [("lora", "per_sample_gradients"), ("full", "mapped_gradients")], ids=["factors", "own weights"]
)
def test_factors_go_through_the_group_axis_and_own_weights_are_mapped_in_one_pass_a_batch(monkeypatch, adapter, way):
    model, state, split = setting("minisam", adapter)
    batches, passes, whole = [], [], getattr(fisher, way)
    monkeypatch.setattr(fisher, way, lambda m, s, *a: batches.append(len(a[-1])) or whole(m, s, *a))
    model.register_forward_pre_hook(lambda *a: passes.append(1))
    diagonal_fisher(model, state, split, batch=2)
    assert batches == [2, 1] and len(passes) == 2


OTHERS = [n for n in MODELS if n not in ("meshnet", "swin_unetr3d")]  # the latter in 2D: two minutes in 3D


@pytest.mark.parametrize("network", ["meshnet", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_mapped_gradients_are_those_of_a_loop_on_every_network(network):
    entry = MODELS[network]
    model = prepare(build(network, 2), "full").double().eval()
    state, rng = {n: v.double() for n, v in trainable(model).items()}, torch.Generator().manual_seed(0)
    side = 64 if network == "unetr" else entry.smallest  # UNETR is built for one size
    x = torch.rand(2, 3, *(side,) * entry.dims, generator=rng).double()
    y = (x.mean(1) > 0.5).to(torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fisher.mapped_gradients(model, state, x, y)
    for i in range(2):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items() if not statistic(n)}
        loss = log_loss(call(model, state | leaves, x[i : i + 1]), y[i : i + 1]).sum()
        one = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))
        own = {name: g[i] for name, g in found.items()}
        assert S.norm(S.sub(own, one)) < 1e-9 * S.norm(one)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_square_of_a_batchs_mean_gradient_is_smaller_and_not_what_it_is(adapter):
    """Entry by entry by Jensen; for gradients that cancel it would be nothing at all."""
    model, state, split = setting("minisam", adapter)
    found = diagonal_fisher(model, state, split)
    squared = {name: g**2 for name, g in gradient(model, state, split, range(3)).items()}
    assert all((squared[name] <= found[name] + 1e-15).all() for name in found)
    trace, other = (sum(float(v.sum()) for v in s.values()) for s in (found, squared))
    assert 0 < other < 0.9 * trace


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_pixels_that_nobody_judges_count_nowhere(adapter):
    """None judged: nothing. One judged: its gradient alone."""
    model, state, split = setting("minisam", adapter)
    alone = Split(split.images[:1], torch.full_like(split.masks[:1], IGNORE))
    assert all(not value.any() for value in diagonal_fisher(model, state, alone).values())
    alone.masks[0, 7, 9] = 2
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    loss = -call(model, leaves, alone.images)[0].log_softmax(0)[2, 7, 9]
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = diagonal_fisher(model, state, alone)
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g**2, rtol=1e-8, atol=1e-12)


def test_the_loss_is_the_mean_over_an_images_pixels():
    _, _, split = setting("minisam", "lora")
    logits = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.stack([pixel_mean(logits[i], split.masks[i]) for i in range(3)])
    torch.testing.assert_close(log_loss(logits, split.masks), expected)


def test_where_an_image_has_one_label_the_loss_is_that_labels():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, IGNORE, 4])
    wanted = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    assert torch.equal(log_loss(logits, labels), wanted) and wanted[2] == 0


@pytest.mark.parametrize(("network", "adapter"), [("minisam", "lora"), ("minisam", "full"), ("attention_unet", "full")])
def test_the_batch_size_changes_nothing(network, adapter):
    model, state, split = setting(network, adapter, images=5)
    expected = diagonal_fisher(model, state, split, batch=5)
    for batch in (1, 2):
        found = diagonal_fisher(model, state, split, batch=batch)
        assert S.norm(S.sub(found, expected)) < 1e-12 * S.norm(expected)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_only_the_first_images_are_looked_at(adapter):
    model, state, split = setting("minisam", adapter)
    first = Split(split.images[:2], split.masks[:2])
    found, expected = diagonal_fisher(model, state, split, images=2), diagonal_fisher(model, state, first)
    assert S.norm(S.sub(found, expected)) < 1e-12 * S.norm(expected)
    assert S.norm(S.sub(found, diagonal_fisher(model, state, split))) > 1e-3 * S.norm(expected)


def test_nothing_that_it_is_given_changes():
    """Batch norms in training would write their statistics into the state."""
    model, state, split = setting("attention_unet", "full")
    model.train()
    before = S.digest([state, dict(model.named_parameters()), dict(model.named_buffers())])
    diagonal_fisher(model, state, split)
    assert S.digest([state, dict(model.named_parameters()), dict(model.named_buffers())]) == before
    assert model.training
