"""Episodes in other styles: edges by morphology, the contrast by a double loop, both steps by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.features import embed
from fedlora_mini.data import IGNORE
from fedlora_mini.data.spectral import low_frequency_swap, mean_amplitude
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.schedule import Schedule, together
from fedlora_mini.federation.sharing import everything
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.regularizers import Context
from fedlora_mini.regularizers.episode import Episode, contrast, edge_means

# ---------------------------------------------------------------- edges


def blobs(shape, seed=0):
    """Connected structures of two classes, some of them at the image's border."""
    field = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(field, (0, *[1.5] * (len(shape) - 1)))
    return torch.from_numpy((smooth > 0.05).astype(np.uint8) + (smooth > 0.25))


def mean_where(z, where):
    return z[:, torch.from_numpy(where)].mean(1) if where.any() else torch.zeros(len(z))


def by_morphology(z, masks):
    """Image by image; a structure does not end at the image's border."""
    edge, ground = [], []
    for own, mask in zip(z, masks.numpy(), strict=True):
        cube = np.ones((3,) * mask.ndim)
        solid, known = mask > 0, mask != IGNORE
        eroded = ndimage.binary_erosion(solid, cube, border_value=1)
        dilated = ndimage.binary_dilation(solid & known, cube, iterations=2)
        edge.append(mean_where(own, solid & known & ~eroded))
        ground.append(mean_where(own, dilated & ~solid))
    return torch.stack(edge), torch.stack(ground)


@pytest.mark.parametrize("shape", [(2, 30), (3, 24, 20), (2, 10, 9, 8)], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_boundary_and_background_are_those_of_an_erosion_and_a_dilation(shape, ignored):
    masks = blobs(shape)
    if ignored:
        masks[:, : shape[1] // 2] = torch.where(
            blobs(shape, 1)[:, : shape[1] // 2] > 0, IGNORE, masks[:, : shape[1] // 2]
        )
    z = torch.randn(shape[0], 4, *shape[1:], generator=torch.Generator().manual_seed(0))
    found, expected = edge_means(z, masks), by_morphology(z, masks)
    for own, wanted in zip(found, expected, strict=True):
        assert wanted.any(1).all()
        torch.testing.assert_close(own, wanted)


def test_an_image_without_structures_has_no_edge():
    z = torch.ones(2, 3, 6, 6)
    for value in (0, IGNORE):
        inner, outer = edge_means(z, torch.full((2, 6, 6), value, dtype=torch.uint8))
        assert not inner.any() and not outer.any()


def test_a_smaller_z_is_repeated():
    z, masks = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)), blobs((2, 12, 10))
    found = edge_means(z, masks)
    for own, wanted in zip(found, by_morphology(z.repeat_interleave(2, 2).repeat_interleave(2, 3), masks), strict=True):
        torch.testing.assert_close(own, wanted)


# ---------------------------------------------------------------- contrast


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_the_contrast_is_that_of_a_double_loop(n, tau):
    rng = torch.Generator().manual_seed(n)
    edges, styled = ([torch.randn(n, 5, generator=rng).double() for _ in range(2)] for _ in range(2))
    points = [(c, part[c][i]) for part in (edges, styled) for c in (0, 1) for i in range(n)]
    total = 0.0
    for i, (c, e) in enumerate(points):

        def similar(j, e=e):
            return math.exp(float(torch.cosine_similarity(e, points[j][1], dim=0)) / tau)

        others = [j for j in range(len(points)) if j != i]
        friends = [j for j in others if points[j][0] == c]
        total -= sum(math.log(similar(j) / sum(map(similar, others))) for j in friends) / len(friends)
    found = float(contrast(tuple(edges), tuple(styled), tau))
    assert found == pytest.approx(total / len(points), rel=1e-8)


def test_features_of_a_class_attract_and_of_the_other_repel():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    apart, mixed = contrast((one, other), (one, other), 0.5), contrast((one, one), (other, other), 0.5)
    assert apart < mixed


# ---------------------------------------------------------------- the episode

LR = 0.1


def setting():
    model = prepare(build("minisam", 3, d=16, depth=1, stem=4, width=4), "full").double()
    rng = torch.Generator().manual_seed(0)
    state = {n: v + 0.05 * torch.randn(v.shape, generator=rng).double() for n, v in trainable(model).items()}
    x = 0.4 + 0.2 * torch.rand(2, 3, 16, 16, generator=rng).double()  # nothing is clipped
    y = blobs((2, 16, 16), 3)
    styles = [mean_amplitude(at + 0.2 * torch.rand(4, 3, 16, 16, generator=rng)).double() for at in (0.3, 0.5)]
    return model, state, x, y, {f"~bank/style/{k}": style for k, style in enumerate(styles)}


class Seen:
    """What the network is asked for: (state, images)."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, state, x):
        self.calls.append((state, x))
        return embed(self.model, state, x)


def penalty(term, model, state, x, y, kept, moves=None, **when):
    """Its value, its gradient and the calls."""
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    run = Seen(model)
    moves = frozenset(state if moves is None else moves)
    z = embed(model, leaves, x)[1]
    context = Context(
        when.get("round", 1), when.get("step", 1), {}, {}, LR, moves=moves, kept=kept, x=x, y=y, z=z, run=run
    )
    value = term.penalty(leaves, context)
    g = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value, dict(zip(leaves, g, strict=True)), run.calls


def step(model, state, x, y, inner, clamp):
    """θ - α ∇L(θ), the entries of ∇L clamped."""
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    g = torch.autograd.grad(segmentation_loss(embed(model, leaves, x)[0], y).mean(), list(leaves.values()))
    return {n: v - inner * d.clamp(-clamp, clamp) for (n, v), d in zip(state.items(), g, strict=True)}


@pytest.mark.parametrize(("inner", "clamp"), [(0.5, 1.0), (0.5, 1e-3)])
def test_the_inner_step_is_of_first_order_and_the_outer_one_at_its_end(inner, clamp):
    """The penalty's gradient is ∇L(fast; x̃): the same as by a model that simply stands at the fast weights."""
    model, state, x, y, kept = setting()
    value, g, calls = penalty(Episode(inner, clamp, contrast=0.0), model, state, x, y, kept)
    fast = step(model, state, x, y, inner, clamp)
    assert S.norm(S.sub({n: v.detach() for n, v in calls[-1][0].items()}, fast)) < 1e-12 * S.norm(fast)
    leaves = {name: v.clone().requires_grad_() for name, v in fast.items()}
    outer = segmentation_loss(embed(model, leaves, calls[-1][1])[0], y).mean()
    expected = dict(zip(leaves, torch.autograd.grad(outer, list(leaves.values())), strict=True))
    assert value.item() == pytest.approx(outer.item())
    assert S.norm(S.sub(g, expected)) < 1e-10 * S.norm(expected)
    assert S.norm(S.sub(fast, state)) > 1e-4


def test_the_contrast_pulls_both_passes():
    """Against the gradient of its formula through z at θ and z̃ at the fast weights, both functions of θ."""
    model, state, x, y, kept = setting()
    value, g, calls = penalty(Episode(0.5, contrast=0.7, tau=0.5), model, state, x, y, kept)
    plain, without, _ = penalty(Episode(0.5, contrast=0.0), model, state, x, y, kept)
    moved = {n: (v.detach() - state[n]) for n, v in calls[-1][0].items()}
    leaves = {name: v.clone().requires_grad_() for name, v in state.items()}
    z, styled = embed(model, leaves, x)[1], embed(model, S.add(leaves, moved), calls[-1][1])[1]
    apart = 0.7 * contrast(edge_means(z, y), edge_means(styled, y), 0.5)
    extra = torch.autograd.grad(apart, list(leaves.values()), allow_unused=True)
    assert (value - plain).item() == pytest.approx(apart.item(), rel=1e-6)
    for (name, own), more in zip(g.items(), extra, strict=True):
        torch.testing.assert_close(own - without[name], torch.zeros_like(own) if more is None else more)


def test_what_stands_still_takes_no_inner_step():
    model, state, x, y, kept = setting()
    moves = [name for name in state if name.startswith("decoder")]
    _, _, calls = penalty(Episode(0.5), model, state, x, y, kept, moves)
    fast = calls[-1][0]
    assert {n for n in state if not torch.equal(fast[n].detach(), state[n])} == set(moves)


def test_the_images_go_a_random_share_of_the_way_to_one_of_the_styles():
    """Image by image: its change is the share times the change all the way; the same again for the same step."""
    model, state, x, y, kept = setting()
    used, shares = set(), []
    for number in range(1, 9):
        styled = penalty(Episode(ratio=0.2), model, state, x, y, kept, step=number)[2][-1][1]
        assert torch.equal(styled, penalty(Episode(ratio=0.2), model, state, x, y, kept, step=number)[2][-1][1])
        fits = {}
        for name, style in kept.items():
            whole = low_frequency_swap(x, style, 0.2) - x
            share = ((styled - x) * whole).sum((1, 2, 3)) / whole.square().sum((1, 2, 3))
            fits[name] = (styled - x - share[:, None, None, None] * whole).abs().max(), share
        name = min(fits, key=lambda name: float(fits[name][0]))
        assert fits[name][0] < 1e-9
        used.add(name)
        shares += fits[name][1].tolist()
    assert used == set(kept)
    assert 0 <= min(shares) < 0.2 and 0.8 < max(shares) <= 1 and len(set(shares)) == len(shares)


def test_volumes_are_restyled_volume_by_volume():
    rng = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(3, 3, 4, 8, 8, generator=rng)
    y = torch.ones(3, 4, 8, 8, dtype=torch.uint8)
    calls = []

    def run(state, images):
        calls.append(images)
        return images.mean(1, keepdim=True).expand(-1, 2, -1, -1, -1) * state["w"], images

    style = mean_amplitude(torch.rand(2, 3, 4, 8, 8, generator=rng))
    context = Context(1, 1, {}, {}, LR, moves=frozenset("w"), kept={"~bank/style/1": style}, x=x, y=y, z=x, run=run)
    Episode(contrast=0.0).penalty({"w": torch.ones((), requires_grad=True)}, context)
    whole = low_frequency_swap(x, style, 0.05) - x
    shares = ((calls[-1] - x) / whole).flatten(1)
    middle = shares.median(1).values
    assert len(set(middle.round(decimals=4).tolist())) == 3
    torch.testing.assert_close(calls[-1] - x, middle[:, None, None, None, None] * whole, atol=1e-5, rtol=1e-3)


def test_without_other_styles_there_is_no_episode():
    _, state, x, y, _ = setting()
    context = Context(1, 1, {}, {}, LR, moves=frozenset(state), kept={"~style": x[0]}, x=x, y=y)
    assert Episode().penalty(state, context) == 0.0


def test_a_training_step_is_by_the_sum_of_both_losses():
    model, state, x, y, kept = setting()
    method = Method("", "full", everything, objective=(Episode(0.5, contrast=0.0),))
    args = (keys(model, list(state)), [state], lambda step: (x, y), Budget(1, 2, LR, "sgd"), 1)
    [end], _ = train(model, method, *args, kept=[kept])
    outer = penalty(Episode(0.5, contrast=0.0), model, state, x, y, kept)[1]
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    g = torch.autograd.grad(segmentation_loss(embed(model, leaves, x)[0], y).mean(), list(leaves.values()))
    expected = {n: v - LR * (own + outer[n]) for (n, v), own in zip(state.items(), g, strict=True)}
    assert S.norm(S.sub(end, expected)) < 1e-10 * S.norm(S.sub(expected, state))


def test_the_schedule_says_what_the_inner_step_may_move():
    model, state, x, y, kept = setting()
    decoder = Schedule("decoder", lambda key, round, step, steps: key.region == "decoder")
    ends = []
    for schedule in (together, decoder):
        method = Method("", "full", everything, schedule, objective=(Episode(0.5),))
        args = (keys(model, list(state)), [state], lambda step: (x, y), Budget(1, 2, LR, "sgd"), 1)
        ends.append(train(model, method, *args, kept=[kept])[0][0])
    moved = {name for name in state if not torch.equal(ends[1][name], state[name])}
    assert moved == {name for name in state if name.startswith("decoder")}
    assert not torch.equal(ends[0]["decoder.up1.weight"], ends[1]["decoder.up1.weight"])
