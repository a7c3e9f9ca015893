"""The picture's numbers: formulas against independent oracles, and the page's JavaScript against numpy."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import traitlets
from scipy.optimize import minimize_scalar

from fedlora_mini.widgets import SoftThreshold, proximal_path, soft_threshold
from fedlora_mini.widgets.base import load

GRID = [
    {"v": v, "tau": tau, "rho": rho, "steps": 12, "start": start}
    for v in ([2.4, 1.7, -0.6, 0.3, 0.0], [1e-9, -3.0], [0.5])
    for tau in (0.0, 0.3, 0.5, 5.0)
    for rho in (0.1, 1.0)
    for start in (1.0, -0.2)
]


def test_soft_threshold_is_pytorch_s_softshrink() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for tau in (0.0, 0.5, 2.0):
        expected = torch.nn.functional.softshrink(x, tau).numpy()
        np.testing.assert_allclose(soft_threshold(x.numpy(), tau), expected, atol=1e-15)


@pytest.mark.parametrize("x", [-2.0, -0.3, 0.4, 1.5])
def test_soft_threshold_minimises_the_proximal_objective(x: float) -> None:
    found = minimize_scalar(
        lambda z: 0.5 * (z - x) ** 2 + 0.5 * abs(z), bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert soft_threshold(np.array([x]), 0.5)[0] == pytest.approx(found.x, abs=1e-5)


def test_the_path_descends_to_the_survivors_and_reaches_exact_zeros() -> None:
    v, lam = np.array([2.0, -0.7, 0.2]), 0.5
    path = proximal_path(v, lam, rho=0.2, steps=200)
    objective = 0.5 * ((path - v) ** 2).sum(1) + lam * np.abs(path).sum(1)
    assert (np.diff(objective) <= 1e-12).all()
    np.testing.assert_allclose(path[-1], soft_threshold(v, lam), atol=1e-8)
    assert path[-1, 2] == 0.0
    np.testing.assert_allclose(proximal_path(v, lam, rho=1.0, steps=1)[1], soft_threshold(v, lam))


def test_traits_and_result_follow_python() -> None:
    w = SoftThreshold(v=[2.0, 0.5, -0.1], tau=0.4, step=3)
    assert (w.result["rank"], round(w.result["nuclear_norm"], 6)) == (2, 1.7)
    w.tau = 1.5
    assert w.result["rank"] == 1 and w.result["path"].shape == (w.steps + 1, 3)
    w.step = 10_000
    assert w.step == w.steps, "a step past the end of the path is its last"
    assert "τ = 1.50: 1 of 3" in w.summary()


@pytest.mark.parametrize("bad", [{"tau": -1.0}, {"tau": float("nan")}, {"v": []}, {"v": [float("inf")]}, {"rho": 0.0}])
def test_impossible_values_are_refused(bad: dict) -> None:
    with pytest.raises(traitlets.TraitError):
        SoftThreshold(**bad)


@pytest.mark.skipif(not shutil.which("node"), reason="no node on this machine")
def test_javascript_computes_what_numpy_computes(tmp_path: Path) -> None:
    (tmp_path / "widget.mjs").write_text(load("soft_threshold.js"), encoding="utf-8")
    (tmp_path / "run.mjs").write_text(
        'import widget from "./widget.mjs"; import { readFileSync } from "node:fs";\n'
        "const { soft, rank, nuclear, path } = widget.math;\n"
        'const out = JSON.parse(readFileSync(0, "utf8")).map(({ v, tau, rho, steps, start }) => {\n'
        "  const kept = v.map((x) => soft(x, tau));\n"
        "  return { kept, rank: rank(kept), nuclear: nuclear(kept), path: path(v, tau, rho, steps, start) };\n"
        "});\nconsole.log(JSON.stringify(out));\n"
    )
    done = subprocess.run(
        ["node", str(tmp_path / "run.mjs")], input=json.dumps(GRID), capture_output=True, text=True, check=True
    )
    for case, js in zip(GRID, json.loads(done.stdout), strict=True):
        w = SoftThreshold(**case)
        kept, path = w.result["survivors"], w.result["path"]
        np.testing.assert_allclose(js["kept"], kept, rtol=0, atol=1e-15)
        np.testing.assert_allclose(js["path"], path, rtol=0, atol=1e-14)
        assert js["rank"] == w.result["rank"] and js["nuclear"] == pytest.approx(w.result["nuclear_norm"], abs=1e-14)
        assert [[x == 0 for x in row] for row in js["path"]] == (path == 0).tolist(), "exact zeros agree"
