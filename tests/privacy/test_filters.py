"""The facts about filters that the book teaches, each against an independent computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from scipy.signal import lfilter

from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy import Doppler, Laplacian, LowPass, Rescale
from fedlora_mini.privacy.filters import TAPS, smooth
from fedlora_mini.regularizers import Context

KEYS = {f"{p}.{f}": Key(p, f, p, "linear") for p, f in (("encoder", "A"), ("encoder", "B"), ("head", "D"))}
SPATIAL = [LowPass(), LowPass(3), LowPass(7), LowPass(permuted=True), Laplacian(), Laplacian(3.0), Rescale()]


def gradient(seed=0, n=400, m=300, r=4):
    g = torch.Generator().manual_seed(seed)
    shapes = {"encoder.A": (r, n), "encoder.B": (m, r), "head.D": (3, 7)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def context(memory=None):
    return Context(1, 1, {}, KEYS, 0.1, memory={} if memory is None else memory)


def filtered(term, value, memory=None):
    out = dict(value)
    term.gradient_(out, {}, context(memory))
    return out


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_smoothing_is_a_binomial_convolution_with_mirrored_edges(taps, n):
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    weights = np.array([1.0])
    for _ in range(taps - 1):
        weights = np.convolve(weights, [0.5, 0.5])
    expected = convolve1d(x.numpy(), weights, axis=1, mode="reflect")
    assert np.allclose(smooth(x, 1, taps).numpy(), expected, atol=1e-14)
    assert np.allclose(smooth(x.T, 0, taps).numpy(), expected.T, atol=1e-14)


@pytest.mark.parametrize("taps", TAPS)
def test_all_factors_in_one_look_up_are_each_smoothed_alone(taps):
    g = gradient(n=7, m=2)
    out = filtered(LowPass(taps), g)
    assert torch.allclose(out["encoder.A"], smooth(g["encoder.A"], 1, taps), atol=1e-14)
    assert torch.allclose(out["encoder.B"], smooth(g["encoder.B"], 0, taps), atol=1e-14)
    assert filtered(LowPass(taps), {"head.D": g["head.D"]})["head.D"] is g["head.D"]


def test_white_noise_keeps_70_of_256_of_its_variance():
    x = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert smooth(x, 1).var() == pytest.approx(70 / 256, rel=0.01)
    assert Rescale().factor ** 2 == pytest.approx(70 / 256)


@pytest.mark.parametrize("omega", [0.0, 0.4, 1.5, 3.0])
def test_a_wave_is_scaled_by_the_fourth_power_of_a_cosine(omega):
    t = torch.arange(100, dtype=torch.float64)
    wave = torch.cos(omega * t)
    assert torch.allclose(smooth(wave[None], 1)[0, 5:-5], np.cos(omega / 2) ** 4 * wave[5:-5])


@pytest.mark.parametrize("term", SPATIAL[:-1], ids=repr)
def test_a_constant_stays(term):
    flat = {name: torch.full_like(value, 2.5) for name, value in gradient().items()}
    for name, value in filtered(term, flat).items():
        assert torch.allclose(value, flat[name]), name


@pytest.mark.parametrize("term", SPATIAL, ids=repr)
def test_ranks_are_not_mixed_and_the_head_is_left_alone(term):
    g = gradient()
    out = filtered(term, g)
    assert torch.equal(out["head.D"], g["head.D"])
    one = {name: torch.zeros_like(value) for name, value in g.items()}
    one["encoder.A"][2], one["encoder.B"][:, 2] = g["encoder.A"][2], g["encoder.B"][:, 2]
    alone = filtered(term, one)
    assert torch.allclose(alone["encoder.A"][2], out["encoder.A"][2]) and not alone["encoder.A"][[0, 1, 3]].any()
    assert torch.allclose(alone["encoder.B"][:, 2], out["encoder.B"][:, 2])
    assert not alone["encoder.B"][:, [0, 1, 3]].any()


@pytest.mark.parametrize("term", SPATIAL, ids=repr)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["branch", "experts"])
def test_a_clients_own_factors_are_filtered_as_the_common_ones_are(term, lead):
    """Each expert's alone: what is filtered as a stack is what the same entries give under the same name one by one."""
    g = torch.Generator().manual_seed(1)
    own = {"encoder.A_own": (*lead, 4, 40), "encoder.B_own": (*lead, 30, 4), "head.D_own": (*lead, 3, 7)}
    keys = {name: Key(*name.split("."), name.split(".")[0], "linear") for name in own}
    value = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in own.items()}

    def found(gradient):
        term.gradient_(out := dict(gradient), {}, replace(context(), keys=keys))
        return out

    out = found(value)
    assert torch.equal(out["head.D_own"], value["head.D_own"])
    for name in ("encoder.A_own", "encoder.B_own"):
        assert not torch.allclose(out[name], value[name])
        alone = [found({name: one})[name] for one in value[name].reshape(-1, *value[name].shape[-2:])]
        assert torch.allclose(out[name], torch.stack(alone).view_as(out[name]), atol=1e-14)
    renamed = filtered(term, {name.removesuffix("_own"): one for name, one in value.items() if "head" not in name})
    if not lead and not getattr(term, "permuted", False):  # whose order is drawn by name
        assert all(torch.equal(renamed[name], out[f"{name}_own"]) for name in renamed)


def test_the_permuted_filter_shrinks_noise_as_much_and_does_not_smooth():
    g = gradient(n=20_000, m=20_000)
    plain, permuted = filtered(LowPass(), g)["encoder.A"], filtered(LowPass(permuted=True), g)["encoder.A"]
    assert permuted.var() == pytest.approx(plain.var().item(), rel=0.03)

    def rough(x):
        return (x.diff(dim=1).square().mean() / x.var()).item()

    assert rough(plain) < 0.5 < 1.9 < rough(permuted), "neighbours of white noise differ by twice its variance"
    assert torch.equal(permuted, filtered(LowPass(permuted=True), g)["encoder.A"]), "the order is a fixed one"


def test_laplacian_smoothing_solves_its_equation():
    g, n, strength = gradient(), 400, 1.7
    ring = 2 * torch.eye(n, dtype=torch.float64) - torch.roll(torch.eye(n, dtype=torch.float64), 1, 0)
    ring = torch.eye(n, dtype=torch.float64) + strength * (ring - torch.roll(torch.eye(n, dtype=torch.float64), -1, 0))
    out = filtered(Laplacian(strength), g)["encoder.A"]
    assert torch.allclose(out @ ring, g["encoder.A"])
    assert filtered(Laplacian(0.0), g)["encoder.A"].sub(g["encoder.A"]).abs().max() < 1e-12


IN_TIME = [Doppler(), Doppler((-1.2, 0.4), (0.1, 0.05, 0.05)), Doppler((), (0.5, 0.3, 0.2))]


@pytest.mark.parametrize("term", IN_TIME, ids=repr)
def test_doppler_is_a_recursive_filter_divided_by_its_answer_to_ones(term):
    steps, memory = [gradient(seed) for seed in range(12)], {}
    found = [filtered(term, g, memory) for g in steps]
    a, b = [1.0, *term.a], list(term.b)
    for name in KEYS:
        series = np.stack([g[name].numpy() for g in steps])
        expected = lfilter(b, a, series, axis=0) / lfilter(b, a, np.ones(12)).reshape(-1, *(1,) * (series.ndim - 1))
        assert np.allclose(np.stack([out[name].numpy() for out in found]), expected)


def test_doppler_counts_the_steps_of_each_tensor_alone():
    """With alternating factors the past of B is B's."""
    memory, ones = {}, {name: torch.ones_like(value) for name, value in gradient().items()}
    for step in range(6):
        name = "encoder.B" if step % 2 == 0 else "encoder.A"
        assert torch.allclose(filtered(Doppler(), {name: ones[name]}, memory)[name], ones[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowPass(4), "3, 5, 7 taps, not 4"),
        (lambda: Laplacian(-1), "least 0"),
        (lambda: Doppler((), ()), "b"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(FedloraError, match=message):
        make()


def test_every_filter_is_free():
    assert all(term.free for term in (*SPATIAL, Doppler()))
