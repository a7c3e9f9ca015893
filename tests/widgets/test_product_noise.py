"""The product-noise picture's numbers: simulation and SciPy as oracles, the page's JavaScript against the library."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import traitlets
from scipy.special import gamma, kv

from fedlora_mini.metrics.noise import injected_energy
from fedlora_mini.widgets import ProductNoise, product_density
from fedlora_mini.widgets.base import load
from fedlora_mini.widgets.product_noise import ARMS, RANKS, M, N

GRID = [
    {"sigma_B": sigma_B, "sigma_A": sigma_A, "norm_B": norm_B, "norm_A": norm_A, "rank": rank, "steps": steps}
    for sigma_B, sigma_A in ((0.0, 0.03), (0.03, 0.03), (0.1, 0.005))
    for norm_B, norm_A in ((0.0, 1.5), (1.5, 4.0))
    for rank in RANKS
    for steps in (2, 20, 40)
]


def test_the_energies_are_those_of_simulated_walks() -> None:
    w = ProductNoise(rank=4, steps=6, norm_B=1.0, norm_A=2.0)
    chance = torch.Generator().manual_seed(0)
    B, A = (torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in ((M, 4), (4, N)))
    B, A = B / B.norm(), 2 * A / A.norm()
    for arm, (schedule, share, factor) in ARMS.items():
        sources = [torch.Generator().manual_seed(k) for k in (1, 2)]
        found = injected_energy(B, A, 0.03 * factor, schedule, round(6 * share), sources, draws=200)
        terms = [found.from_B, found.from_A, found.product]
        np.testing.assert_allclose(w.result["terms"][arm], terms, rtol=0.05)
        assert w.result["total"][arm] == pytest.approx(sum(w.result["terms"][arm]))


def test_alternating_equals_half_as_many_and_the_same_privacy_has_less() -> None:
    """Claim L1 in the picture: 1 : 1, and at the same privacy a half of the linear terms, a quarter of the product."""
    w = ProductNoise()
    both, alternating, half, private = w.result["terms"].values()
    assert alternating == half
    np.testing.assert_allclose(np.divide(both, half), [2, 2, 4])
    np.testing.assert_allclose(np.divide(private, half), [0.5, 0.5, 0.25])


@pytest.mark.parametrize("rank", RANKS)
def test_the_density_is_bessel_s_and_has_variance_one(rank: int) -> None:
    z = np.linspace(-40, 40, 160_001)
    f = product_density(z, rank)
    step = z[1] - z[0]
    assert f.sum() * step == pytest.approx(1, abs=1e-5) and (f * z**2).sum() * step == pytest.approx(1, abs=1e-5)
    assert (f * z**4).sum() * step == pytest.approx(3 + 6 / rank, rel=1e-4), "excess kurtosis 6 / r"
    at, nu = np.array([0.3, 1.0, 4.0]), (rank - 1) / 2
    x = math.sqrt(rank) * at
    bessel = math.sqrt(rank) * x**nu * kv(nu, x) / (math.sqrt(math.pi) * 2**nu * gamma(rank / 2))
    np.testing.assert_allclose(product_density(at, rank), bessel, rtol=1e-10)


def test_traits_and_result_follow_python() -> None:
    w = ProductNoise(sigma_B=0.0)
    assert w.result["terms"]["K steps of both"][0] == 0 == w.result["terms"]["K steps of both"][2]
    w.sigma_A, w.rank = 0.0, 2
    assert w.result["total"]["K alternating"] == 0 and w.result["snr"]["K alternating"] == math.inf
    assert "r = 2, K = 20" in w.summary()
    assert w.result["signal"] == pytest.approx(1.5**4 / 2)


BAD = [{"rank": 3}, {"steps": 5}, {"steps": 0}, {"sigma_B": -0.1}, {"norm_A": float("nan")}, {"sigma_A": float("inf")}]


@pytest.mark.parametrize("bad", BAD)
def test_impossible_values_are_refused(bad: dict) -> None:
    with pytest.raises(traitlets.TraitError):
        ProductNoise(**bad)


@pytest.mark.skipif(not shutil.which("node"), reason="no node on this machine")
def test_javascript_computes_what_the_library_computes(tmp_path: Path) -> None:
    (tmp_path / "widget.mjs").write_text(load("product_noise.js"), encoding="utf-8")
    (tmp_path / "run.mjs").write_text(
        'import widget from "./widget.mjs"; import { readFileSync } from "node:fs";\n'
        "const { arms, signal, density } = widget.math;\n"
        "const z = Array.from({ length: 41 }, (_, i) => i / 4 - 5);\n"
        'const out = JSON.parse(readFileSync(0, "utf8")).map((state) => ({\n'
        "  arms: arms(state), signal: signal(state), density: z.map((x) => density(x, state.rank)),\n"
        "}));\nconsole.log(JSON.stringify(out));\n"
    )
    widgets = [ProductNoise(**case) for case in GRID]
    states = json.dumps([w.state() for w in widgets])
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], input=states, capture_output=True, text=True, check=True)
    for case, w, js in zip(GRID, widgets, json.loads(done.stdout), strict=True):
        expected = w.result
        assert [arm["name"] for arm in js["arms"]] == list(ARMS)
        for arm in js["arms"]:
            np.testing.assert_allclose(arm["terms"], expected["terms"][arm["name"]], rtol=1e-12, err_msg=str(case))
        assert js["signal"] == pytest.approx(expected["signal"], rel=1e-14)
        np.testing.assert_allclose(js["density"], expected["density"], rtol=1e-11, err_msg=str(case))
