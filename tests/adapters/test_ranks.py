"""Ranks per layer against numpy's singular values of the unfolded weight, and on matrices whose spectrum is known."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import adapters, prepare
from fedlora_mini.adapters.ops import matrix_shape, to_weight
from fedlora_mini.adapters.places import layers
from fedlora_mini.adapters.ranks import by_depth, by_spectrum, by_stable_rank, spectrum, stable_rank
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import build
from fedlora_mini.models.pretrained import load_base

LAYERS = {  # and the weight as a matrix, written out
    "wide": (lambda: nn.Linear(9, 5), lambda W: W),
    "tall": (lambda: nn.Linear(4, 12), lambda W: W),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2)), lambda W: np.stack([W[i].ravel() for i in range(6)])),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda W: np.stack([W[i].ravel() for i in range(6)])),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), lambda W: np.stack([W[:, i].ravel() for i in range(6)])),
}


def with_spectrum(sigma, m=12, n=20, layer=None):
    """A layer whose weight has these singular values."""
    layer = nn.Linear(n, m) if layer is None else layer
    m, n = matrix_shape(layer)
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, len(sigma), generator=g, dtype=torch.float64))[0] for k in (m, n))
    layer.double().weight.data = to_weight(layer, U * torch.tensor(sigma, dtype=torch.float64) @ V.T)
    return layer


@pytest.mark.parametrize("layer", LAYERS)
def test_against_numpy_on_the_unfolded_weight(layer):
    make, unfold = LAYERS[layer]
    for seed in range(5):
        torch.manual_seed(seed)
        module = make()
        sigma = np.linalg.svd(unfold(module.weight.detach().double().numpy()), compute_uv=False)
        assert np.allclose(spectrum(module).numpy(), sigma, rtol=1e-10)
        assert by_stable_rank(module, 0.5) == round((sigma**2).sum() / sigma[0] ** 2)
        for tau in (0.1, 0.3, 0.9, 1.0):
            shares = [sigma[:k].sum() / sigma.sum() for k in range(1, len(sigma) + 1)]
            expected = next(k for k, share in enumerate(shares, 1) if share >= tau - 1e-9)
            assert by_spectrum(module, 0.5, tau=tau) == expected


@pytest.mark.parametrize("layer", [None, nn.Conv2d(4, 12, 3), nn.ConvTranspose2d(9, 12, 2)])
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_a_known_spectrum_whatever_its_size(layer, scale):
    module = with_spectrum([scale * s for s in (4.0, 3.0, 2.0, 1.0)], layer=layer)
    assert stable_rank(module.weight.flatten(1)) >= 1
    assert by_stable_rank(module, 0.0) == round((16 + 9 + 4 + 1) / 16)
    assert [by_spectrum(module, 0.0, tau=t) for t in (0.1, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91)] == [1, 1, 2, 2, 3, 3, 4]


def test_extremes():
    """Equal values have the full stable rank, a rank-one matrix has 1, and every rule gives at least 1."""
    equal, one, zero = (with_spectrum(s) for s in ([2.0] * 12, [5.0], [0.0]))
    assert stable_rank(equal.weight) == pytest.approx(12) and by_stable_rank(equal, 0.0) == 12
    assert by_spectrum(equal, 0.0, tau=1.0) == 12 and by_spectrum(equal, 0.0, tau=0.5) == 6
    assert stable_rank(one.weight) == pytest.approx(1) and by_stable_rank(one, 0.0) == by_spectrum(one, 0.0) == 1
    assert stable_rank(zero.weight) == 0 and by_stable_rank(zero, 0.0) == by_spectrum(zero, 0.0) == 1


@pytest.mark.parametrize("rule", [by_stable_rank, lambda *a, **k: by_spectrum(*a, tau=1.0, **k)])
def test_a_largest_rank_caps_it(rule):
    layer = with_spectrum([1.0] * 12)
    assert [rule(layer, 0.0, largest=largest) for largest in (None, 20, 12, 3, 1)] == [12, 12, 12, 3, 1]


def test_depth_grows_linearly_from_first_to_last():
    layer = nn.Linear(3, 3)
    assert [by_depth(layer, d / 8) for d in range(9)] == list(range(4, 13))
    assert [by_depth(layer, d, first=6, last=2) for d in (0.0, 0.5, 1.0)] == [6, 4, 2]
    assert by_depth(layer, 0.0, first=5, last=5) == by_depth(layer, 1.0, first=5, last=5) == 5
    ranks = [by_depth(layer, i / 99) for i in range(100)]
    assert sum(ranks) / 100 == pytest.approx(8, abs=0.1)  # the mean that the paper's 4 to 12 has


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (by_spectrum, {"tau": 0.0}, r"share of the spectrum in \(0, 1\], got 0"),
        (by_spectrum, {"tau": 1.1}, r"got 1\.1"),
        (by_spectrum, {"largest": 0}, "largest is a rank of at least 1, got 0"),
        (by_stable_rank, {"largest": -2}, "largest is a rank of at least 1, got -2"),
        (by_depth, {"first": 0}, "first is a rank of at least 1, got 0"),
        (by_depth, {"last": -1}, "last is a rank of at least 1, got -1"),
    ],
)
def test_options_that_make_no_rank_are_refused(rule, options, message):
    with pytest.raises(FedloraError, match=message):
        rule(nn.Linear(3, 4), 0.5, **options)


@pytest.mark.parametrize(("name", "rule"), [("sr_lora", by_stable_rank), ("sara", by_spectrum), ("prilora", by_depth)])
def test_prepared_layers_have_the_rank_of_their_rule(name, rule):
    """Layer by layer in the order of the network; the head has no rank."""
    plain = build("minisam", 2)
    body = [(path, module) for path, module in plain.named_modules() if layers(path, module) and path != "head"]
    expected = {path: rule(module, i / (len(body) - 1)) for i, (path, module) in enumerate(body)}
    found = {path: a.config()["rank"] for path, a in adapters(prepare(build("minisam", 2), name)) if path != "head"}
    assert found == expected and len(set(found.values())) > 2


def test_options_reach_the_rule():
    ranks = {
        path: a.rank for path, a in adapters(prepare(build("minisam", 2), "prilora", first=2, last=3)) if path != "head"
    }
    assert set(ranks.values()) == {2, 3}
    ranks = [a.rank for path, a in adapters(prepare(build("minisam", 2), "sara", tau=1.0, largest=5)) if path != "head"]
    assert set(ranks) == {5}
    with pytest.raises(FedloraError, match=r"unknown option of adapter 'sara' 'rank'"):
        prepare(build("minisam", 2), "sara", rank=4)


def test_what_the_default_share_keeps_of_the_pretrained_network():
    model = load_base("minisam", 2, (48, 48))
    shares = [
        by_spectrum(module, 0.0) / min(matrix_shape(module))
        for path, module in model.named_modules()
        if layers(path, module) and path != "head"
    ]
    assert min(shares) >= 0.15 and max(shares) <= 0.25
