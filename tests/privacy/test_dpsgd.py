"""The private gradient: clipped image by image, noised once, divided by the expected batch."""

import math

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, prepare, trainable
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.sampling import generator
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.privacy import CLIPS, DPSGD, Guarded, Seeded, dpsgd
from fedlora_mini.privacy.dpsgd import GuardedGroup

N = 5


def problem(seed=0):
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(seed)
    model = prepare(build("minisam", 3, d=16, depth=1, stem=4, width=4), "lora", 0, rank=2).double()
    state = {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in trainable(model).items()}
    x = torch.rand(N, 3, 32, 32, generator=g, dtype=torch.float64)
    return model, state, x, torch.randint(0, 3, (N, 32, 32), generator=g)


def one_by_one(model, state, x, y, names):
    """The gradients of single images by plain backward passes."""
    rows = []
    for i in range(len(x)):
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in state.items()}
        loss = segmentation_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(dict(zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True)))
    return rows


def released(mechanism, problem, n=N, moves=None, seed=0):
    model, state, x, y = problem
    return mechanism.gradient(model, state, segmentation_loss, x, y, n, Seeded(generator(seed)), moves)


@pytest.mark.parametrize("moving", ["all", "B and head"])
@pytest.mark.parametrize("micro", [1, 2, 64])
def test_it_is_the_clipped_sum_of_single_images_over_the_expected_batch(moving, micro):
    model, state, x, y = own = problem()
    names = [n for n in state if moving == "all" or n.endswith(".B") or n.startswith("head")]
    rows = one_by_one(model, state, x, y, names)
    C = sorted(map(S.norm, rows))[2]  # two or three of five are clipped
    total = S.scale(rows[0], 0.0)
    for row in rows:
        total = S.add(total, row, min(1.0, C / S.norm(row)))
    found = released(DPSGD(0.0, 0.1, C, micro=micro), own, n=80, moves=names)
    assert found.keys() == total.keys()
    assert S.norm(S.sub(found, S.scale(total, 1 / 8))) < 1e-12 * S.norm(found)


def test_without_clipping_and_noise_it_is_the_plain_mean():
    model, state, x, y = own = problem()
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    plain = torch.autograd.grad(segmentation_loss(call(model, leaves, x), y).mean(), list(leaves.values()))
    found = released(DPSGD(0.0, 1.0, math.inf), own)
    assert S.norm(S.sub(found, dict(zip(leaves, plain, strict=True)))) < 1e-12 * S.norm(found)


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "normalised"])
def test_one_image_more_moves_the_sum_by_at_most_C(clipping):
    model, state, x, y = problem()
    mechanism = DPSGD(0.0, 1.0, 0.3, clipping)
    with_all = released(mechanism, (model, state, x, y), n=1)
    for i in range(N):
        rest = [k for k in range(N) if k != i]
        without = released(mechanism, (model, state, x[rest], y[rest]), n=1)
        assert S.norm(S.sub(with_all, without)) <= 0.3 * (1 + 1e-9)


def test_per_layer_clipping_gives_every_layer_the_same_share_of_the_radius():
    own = problem()
    found = released(DPSGD(0.0, 1.0, 1e-3, "per-layer"), (*own[:2], own[2][:1], own[3][:1]), n=1)
    layers = {}
    for name, value in found.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = value
    for part in layers.values():
        assert S.norm(part) == pytest.approx(1e-3 / len(layers) ** 0.5, rel=1e-6)
    assert S.norm(found) == pytest.approx(1e-3, rel=1e-6)


def test_the_noise_has_deviation_sigma_C_over_the_expected_batch():
    own = problem()
    mechanism = DPSGD(1.5, 0.25, 0.2)
    silent = released(DPSGD(0.0, 0.25, 0.2), own, n=40)
    draws = torch.stack(
        [
            torch.cat([v.flatten() for v in S.sub(released(mechanism, own, n=40, seed=seed), silent).values()])
            for seed in range(20)
        ]
    )
    assert draws.std() == pytest.approx(1.5 * 0.2 / 10, rel=0.03) and abs(draws.mean()) < 0.001
    assert draws.std(0).min() > 0, "every entry of every tensor gets noise"


def test_nobody_drawn_is_noise_alone():
    model, state, x, y = problem()
    found = released(DPSGD(1.0, 0.5, 1.0), (model, state, x[:0], y[:0]), n=10)
    flat = torch.cat([value.flatten() for value in found.values()])
    assert found.keys() == state.keys() and flat.std() == pytest.approx(1 / 5, rel=0.1)


@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("micro", [1, 2, 64])
def test_an_image_whose_gradient_is_not_finite_counts_as_nothing(clipping, micro):
    model, state, x, y = problem()
    x[3, 0, 5, 5] = math.nan
    mechanism = DPSGD(0.0, 1.0, 0.3, clipping, micro)
    rest = [0, 1, 2, 4]
    found, expected = (released(mechanism, (model, state, *part), n=1) for part in ((x, y), (x[rest], y[rest])))
    assert S.finite(found) and S.norm(S.sub(found, expected)) < 1e-12 * S.norm(expected)


def in_one_pass(problem, sizes, micro, broken=None):
    """The gradients of clients with so many images each, every client with factors and noise of its own."""
    model, state, x, y = problem
    states = S.stack([S.scale(state, 1 + 0.1 * k) for k in range(len(sizes))])
    rows = torch.arange(sum(sizes)) % N
    x, y = x[rows], y[rows]
    if broken is not None:
        x[broken] = math.inf
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    mechanism = DPSGD(1.0, 0.5, 0.3, micro=micro)
    members = [Guarded(mechanism, 10, Seeded(generator("noise", k))) for k in range(len(sizes))]
    group = GuardedGroup(members, [lambda step, part=part: part for part in parts])
    return group.gradient(model, states, segmentation_loss, *group.batches(1), list(state))


@pytest.mark.parametrize("sizes", [(2, 0, 5, 1), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_clients_in_one_pass_hold_at_most_micro_images_and_end_alike(sizes, micro, monkeypatch):
    whole, held = in_one_pass(problem(), sizes, 64), []

    def watched(model, state, loss, x, *rest):
        held.append(len(x))
        return per_sample_gradients(model, state, loss, x, *rest)

    monkeypatch.setattr(dpsgd, "per_sample_gradients", watched)
    parts = in_one_pass(problem(), sizes, micro)
    assert max(held) <= micro and sum(held) == sum(sizes)
    assert S.norm(S.sub(parts, whole)) < 1e-12 * S.norm(whole)


@pytest.mark.parametrize("micro", [2, 64])
def test_one_clients_broken_image_is_not_seen_by_any_client(micro):
    clean, broken = in_one_pass(problem(), (2, 3, 2), micro), in_one_pass(problem(), (2, 3, 2), micro, broken=3)
    assert S.finite(broken)
    for k, equal in enumerate((True, False, True)):
        moved = S.norm(S.sub(S.unstack(broken)[k], S.unstack(clean)[k]))
        assert moved < 1e-12 if equal else 1e-6 < moved <= 0.3 / 5 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1.0, 0.1), "sigma"),
        ((1.0, 0.0), "q must be positive"),
        ((1.0, 2.0), "q must be"),
        ((1.0, 0.1, 0.0), "C must be positive"),
        ((1.0, 0.1, math.inf), "without clipping"),
        ((1.0, 0.1, 1.0, "flatt"), "unknown way to clip 'flatt'.*'flat'"),
        ((1.0, 0.1, 1.0, "flat", 0), "micro"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(FedloraError, match=message):
        DPSGD(*given)
