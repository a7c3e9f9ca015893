"""The leakage picture's numbers: closed forms and simulation as oracles, the page's JavaScript against the library."""

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import traitlets

from fedlora_mini.metrics.leakage import subspace_overlap
from fedlora_mini.widgets import SubspaceLeakage
from fedlora_mini.widgets.base import load
from fedlora_mini.widgets.leakage import RATE, STEPS, M, N, changes_asked, local_round, measure, start

NUMBERS = ("leak_cos2", "leak_explained", "overlap", "drift")
GRID = [
    {"theta": theta, "rank": rank, "sites": sites, "lam": lam, "step": step}
    for theta in (5.0, 35.0, 60.0, 88.0)
    for rank, sites in ((1, 2), (2, 4), (3, 8), (4, 8))
    for lam, step in ((0.0, 7), (0.1, 20), (1.0, 3), (10.0, 2), (10.0, 20))
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("theta", [0.0, 30.0, 72.0, 90.0])
def test_the_angle_is_the_one_between_private_change_and_asked_shared_change(theta: float) -> None:
    dA, asked = changes_asked(theta, draw(5, 3, 3), draw(M, 3, seed=1))
    B0, A0 = start(3)
    for own, D in zip(dA, asked, strict=True):
        private, shared = B0 @ own, D @ A0  # m x n, as matrices
        assert private.shape == (M, N) and float(private.norm()) == pytest.approx(1)
        assert float(shared.norm()) == pytest.approx(1)
        assert float((private * shared).sum()) == pytest.approx(np.cos(np.radians(theta)), abs=1e-12)


def test_without_sor_the_angle_stays_and_the_norm_grows_as_gradient_descent_does() -> None:
    dA, asked = changes_asked(50.0, draw(4, 2, 2), draw(M, 2, seed=1))
    path = local_round(dA, asked, lam=0.0)
    for k in (1, 5, STEPS):
        assert torch.allclose(path[k], (1 - (1 - RATE) ** k) * asked, rtol=1e-10)
        assert measure(path[k], dA)["leak_cos2"] == pytest.approx(np.cos(np.radians(50)) ** 2)


def test_the_first_step_of_a_round_knows_no_sor_and_the_second_jumps_by_lambda_over_the_norm() -> None:
    """At D = 0 there is no angle. One step later |D| = rate, and the slope of cos² is sin 2θ / |D|."""
    dA, asked = changes_asked(60.0, draw(3, 2, 2), draw(M, 2, seed=1))
    free, held = (local_round(dA, asked, lam) for lam in (0.0, 2.0))
    assert torch.equal(free[1], held[1])
    jump = (held[2] - free[2]).norm(dim=(1, 2)) / (RATE * 2.0)
    assert torch.allclose(jump, torch.full_like(jump, np.sin(np.radians(120)) / RATE), rtol=1e-10)


def test_a_large_weight_raises_leak_cos2_before_it_lowers_it() -> None:
    w = SubspaceLeakage(theta=60.0, lam=10.0, step=5)
    assert w.result["path"][1] == pytest.approx(0.25) and w.result["leak_cos2"] > 0.5
    w.step = STEPS
    assert w.result["leak_cos2"] < 0.01 and w.result["drift"] > 2 * w.result["without"]["drift"]
    values = [SubspaceLeakage(theta=60.0, lam=lam, step=STEPS).result["leak_cos2"] for lam in (0.0, 0.1, 0.3, 1.0)]
    assert all(b < a for a, b in pairwise(values))


def test_measures_are_least_squares_and_qr_of_the_dense_matrices() -> None:
    r, K = 3, 5
    dA, D = draw(K, r, N), draw(K, M, r, seed=1)
    B0, A0 = start(r)
    found, mean = measure(D, dA), D.mean(0)
    X, y = torch.stack([(B0 @ own).flatten() for own in dA], 1).numpy(), (mean @ A0).flatten().numpy()
    fit = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    assert found["leak_explained"] == pytest.approx((fit @ fit) / (y @ y))
    assert found["overlap"] == pytest.approx(np.linalg.norm(np.linalg.qr(mean.numpy())[0][:r]) ** 2 / r)
    assert found["drift"] == pytest.approx(np.linalg.norm(y))
    pairs = [((d @ A0).flatten(), (B0 @ own).flatten()) for d, own in zip(D, dA, strict=True)]
    expected = np.mean([float((a @ b) ** 2 / (a @ a) / (b @ b)) for a, b in pairs])
    assert found["leak_cos2"] == pytest.approx(expected)


@pytest.mark.parametrize(("rank", "sites"), [(1, 3), (2, 3), (3, 8)])
def test_the_levels_by_chance_are_the_means_over_random_changes(rank: int, sites: int) -> None:
    w, B0 = SubspaceLeakage(rank=rank, sites=sites), start(rank)[0]
    dA, _ = changes_asked(0.0, draw(sites, rank, rank), draw(M, rank, seed=1))
    draws = [measure(draw(1, M, rank, seed=s).expand(sites, M, rank), dA) for s in range(600)]
    for name, value in w.result["chance"].items():
        assert np.mean([each[name] for each in draws]) == pytest.approx(value, rel=0.12), name
    assert subspace_overlap(B0, B0) == pytest.approx(1)


def test_traits_and_result_follow_python() -> None:
    w = SubspaceLeakage(theta=60.0, lam=0.0)
    assert w.result["leak_cos2"] == pytest.approx(0.25) == pytest.approx(w.result["without"]["leak_cos2"])
    w.theta, w.lam = 90.0, 1.0
    assert w.result["leak_cos2"] < 1e-12 and "θ = 90°" in w.summary() and "λ = 1:" in w.summary()
    assert repr(w) == "SubspaceLeakage(theta=90.0, rank=2, sites=4, lam=1.0, step=12)"
    w.private = [0.0, *w.private[1:]]
    assert w.result["without"]["leak_explained"] > 0


BAD = [
    {"theta": 91.0},
    {"theta": 0.0},
    {"theta": float("nan")},
    {"rank": 5},
    {"sites": 1},
    {"lam": -1.0},
    {"step": 0},
    {"step": 21},
]


@pytest.mark.parametrize("bad", [*BAD, {"common": [1.0]}])
def test_impossible_values_are_refused(bad: dict) -> None:
    with pytest.raises(traitlets.TraitError):
        SubspaceLeakage(**bad)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("node"), reason="no node on this machine")
def test_javascript_computes_what_the_library_computes(tmp_path: Path) -> None:
    (tmp_path / "widget.mjs").write_text(load("leakage.js"), encoding="utf-8")
    (tmp_path / "run.mjs").write_text(
        'import widget from "./widget.mjs"; import { readFileSync } from "node:fs";\n'
        "const { problem, round, metrics, chance } = widget.math;\n"
        'const out = JSON.parse(readFileSync(0, "utf8")).map((state) => {\n'
        "  const sites = problem(state), [was, now] = [0, state.lam].map((lam) => round(sites, lam));\n"
        "  const [without, held] = [was, now].map((rows) => metrics(sites, rows[state.step], state.rank));\n"
        "  const path = now.map((Ds) => metrics(sites, Ds, state.rank).leak_cos2);\n"
        "  return { ...held, without, path, chance: chance(state) };\n"
        "});\nconsole.log(JSON.stringify(out));\n"
    )
    widgets = [SubspaceLeakage(**case) for case in GRID]
    states = json.dumps([w.state() for w in widgets])
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], input=states, capture_output=True, text=True, check=True)
    for case, w, js in zip(GRID, widgets, json.loads(done.stdout), strict=True):
        expected = w.result
        for found, own in ((js, expected), (js["without"], expected["without"])):
            for name in NUMBERS:
                assert found[name] == pytest.approx(own[name], rel=1e-9, abs=1e-12), (case, name)
            np.testing.assert_allclose(found["cosines"], own["cosines"], rtol=1e-8, atol=1e-11, err_msg=str(case))
        np.testing.assert_allclose(js["path"], expected["path"], rtol=1e-9, atol=1e-12, err_msg=str(case))
        assert js["chance"] == pytest.approx(expected["chance"], rel=1e-14)
