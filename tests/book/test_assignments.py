"""Problem sets: the solution passes, wrong answers fail, and the student version gives nothing away."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import assignments
import nbformat
import project
import pytest
import torch

SETS = assignments.names()
VALID = {"grade": False, "solution": True, "locked": False, "task": False, "schema_version": 3, "grade_id": "a-1"}
VALID |= {"cell_type": "code"}

# set, the solution that is broken, correct code, wrong code, the check that has to see it
MUTANTS = [
    ("set1", "t1-solution", "(x.abs() - tau).clamp(min=0)", "x.abs() * (x.abs() > tau)", "t1-check"),  # hard threshold
    ("set1", "t1-solution", "x.sign() * (x.abs() - tau)", "(x - tau)", "t1-check"),  # positive x only
    ("set1", "t1-solution", ".clamp(min=0)", ".clamp(min=1e-9)", "t1-check"),  # small instead of zero
    ("set1", "t2-solution", "s * v[:, None] * BG", "s * BG", "t2-check"),
    ("set1", "t2-solution", "s * (BG * A)", "(BG * A)", "t2-check"),
    ("set1", "t2-solution", "(BG * A).sum(dim=1)", "((B.T[:, :, None] * A[:, None]) * G).sum(dim=(1, 2))", "t2-check"),
    ("set1", "t3-solution", "conv.padding, conv.dilation)", "conv.padding)", "t3-check"),
    ("set1", "t3-solution", "F.conv2d(x, kernels, None, conv.stride,", "F.conv2d(x, kernels, None, 1,", "t3-check"),
    ("set1", "t3-solution", "s * (B @ A)", "(B @ A)", "t3-check"),
    ("set1", "t4-solution", "rho * lam)", "lam)", "t4-check"),  # the threshold without the step size
    ("set1", "t4-solution", "rho * lam)", "eta * lam)", "t4-check"),
    ("set1", "t4-solution", "rho * lam)", "2 * rho * lam)", "t4-check"),
    ("set1", "t4-solution", "soft_threshold(v - rho * dv, rho * lam)", "v - rho * (dv + lam * v.sign())", "t4-check"),
    ("set1", "t4-solution", "gradient(delta(A, v, B)), A, v, B)[1]",
     "gradient(delta(A + eta * dA, v, B + eta * dB)), A + eta * dA, v, B + eta * dB)[1]", "t4-check"),  # the old A, B
    ("set1", "t4-solution", "A, B = A - eta * dA, B - eta * dB", "A = A - eta * dA", "t4-check"),
    ("set1", "t5-rescaled-solution", "v / c, c * B", "v * c, B / c", "t5-rescaled-check"),
    ("set1", "t5-gauge-solution", "size = v * a * b", "size = v * a", "t5-gauge-check"),
    ("set1", "t5-gauge-solution", "(a == 0) | (b == 0)", "(a == 0) & (b == 0)", "t5-gauge-check"),  # nan
    ("set1", "t5-gauge-solution", "size = v * a * b", "size = v.abs() * a * b", "t5-gauge-check"),
    ("set1", "t5-gauge-solution", "dead = (a == 0) | (b == 0)",
     "return F.normalize(A, dim=1), size, F.normalize(B * v.sign(), dim=0)", "t5-gauge-check"),  # the sign moves to B
    ("set1", "t6-solution", "lam * min(1, 2 * t / steps)", "lam", "t6-check"),
    ("set1", "t6-solution", "unit_gauge(*arena_step(*parts, gradient, eta, rho, lam * min(1, 2 * t / steps)))",
     "arena_step(*parts, gradient, eta, rho, lam * min(1, 2 * t / steps))", "t6-check"),
    ("set1", "t6-solution", "(v != 0).sum()", "(v > 0).sum()", "t6-check"),
    ("set1", "t7-solution", "sigma.square().sum() / sigma[0].square()", "sigma.sum() / sigma[0]", "t7-check"),
    ("set1", "t7-solution", "sigma.cumsum(dim=0)", "sigma.square().cumsum(dim=0)", "t7-check"),
    ("set1", "t7-solution", "int(before) + 1", "int(before)", "t7-check"),
    ("set1", "t7-solution", " * (1 - 1e-12)", "", "t7-check"),  # rounding asks for one more than there are
    ("set1", "t8-solution", "v != 0", "v > 0", "t8-check"),
    ("set1", "t8-solution", "v != 0", "v.abs() > 1e-3", "t8-check"),
    ("set1", "t8-solution", "kept = v != 0", "kept = v.nonzero().squeeze()", "t8-check"),  # one loses its axis
    ("set1", "t8-solution", "A.numel() + B.numel()", "int((v != 0).sum()) * (len(A[0]) + len(B))", "t8-check"),
    ("set1", "t8-solution", "A.numel() + B.numel()", "A.numel() + v.numel() + B.numel()", "t8-check"),
    ("set2", "t1-solution", "[count / sum(counts) for count in counts]", "[1 / len(counts)] * len(counts)", "t1-check"),
    ("set2", "t1-solution", "count / sum(counts)", "count / max(counts)", "t1-check"),
    ("set2", "t1-solution", "share * state[name].double()", "state[name].mul_(share)", "t1-check"),  # in place
    ("set2", "t2-lost-solution", "B - torch.tensordot(p, B, 1)", "torch.tensordot(p, B, 1) - B", "t2-lost-check"),
    ("set2", "t2-lost-solution", "(p[:, None, None] * dB)", "(dB / len(p))", "t2-lost-check"),  # equal weights
    ("set2", "t2-lost-solution", "return (p[:, None, None] * dB).transpose(0, 1).flatten(1), dA.flatten(0, 1)",
     "U, S, V = torch.linalg.svd(torch.einsum('k,kmr,krn->mn', p, dB, dA))\n    return U[:, :8] * S[:8], V[:8]",
     "t2-lost-check"),  # m x n
    ("set2", "t2-error-solution", "float((off / size).sqrt())", "float(off / size)", "t2-error-check"),
    ("set2", "t2-error-solution", "(p[:, None, None] * B)", "(B / len(p))", "t2-error-check"),
    ("set2", "t2-error-solution", "(L.T @ L) * (N @ N.T)).sum()", "L @ N).square().sum()", "t2-error-check"),  # m x n
    ("set2", "t3-solution", "len(moved) == 2", "'AB' in steps", "t3-check"),  # LA-LoRA alternates within a round
    ("set2", "t3-solution", '"private" if own', '"private" if len(shared) < 2', "t3-check"),  # FFA-LoRA sends B alone
    ("set2", "t3-solution", '"private" if own else ', "", "t3-check"),
    ("set2", "t3-solution", "found, own = [], set()", "return ['private' if e is None else 'lossy' if e else 'exact'"
     " for e in play(schedule, shared)]\n    found, own = [], set()", "t3-check"),  # by running it
    ("set2", "t4-solution", "rank / len(A) * B", "B", "t4-check"),
    ("set2", "t4-solution", "rank / len(A) * B", "len(A) / rank * B", "t4-check"),
    ("set2", "t4-solution", "share * R / len(A) * B", "share * B", "t4-check"),
    ("set2", "t4-solution", "share * R / len(A) * B", "share * max(map(len, As)) / len(A) * B", "t4-check"),
    ("set2", "t5-solution", "p.sqrt()", "p", "t5-check"),
    ("set2", "t5-solution", "(e, key=e.get)", "(e, key=lambda factor: -e[factor])", "t5-check"),
    ("set2", "t5-solution", "svdvals(stack).square()", "svdvals(stack)", "t5-check"),
    ("set2", "t5-solution", '{"B": weighted.transpose(0, 1).flatten(1), "A": weighted.flatten(0, 1)}',
     '{"A": weighted.transpose(0, 1).flatten(1), "B": weighted.flatten(0, 1)}', "t5-check"),
    ("set2", "t6-solution", "torch.tensordot(p, value, 1)", "value.mean(0)", "t6-check"),
    ("set2", "t6-solution", "if name in travels", "if name not in travels", "t6-check"),
    ("set2", "t6-solution", "else value\n", "else value[:1].expand_as(value)\n", "t6-check"),  # the first site's
    ("set2", "t6-solution", "steps(world, held,", "steps(world, {**start(world), **{k: v for k, v in held.items()"
     " if k[-1] in sharing[k[:-2]]}},", "t6-check"),  # private factors are forgotten between rounds
    ("set2", "t6-solution", 'world["p"], sharing)\n    return held',
     'world["p"], {})\n    return server_turn(held, world["p"], sharing)', "t6-check"),  # one mean, at the end
    ("set2", "t7-solution", '"A": (B0, A - A0)', '"A": (B, A - A0)', "t7-check"),
    ("set2", "t7-solution", "return by[shared]", 'return by["B"]', "t7-check"),
    ("set2", "t7-solution", "inner(first, second) ** 2", "inner(first, second).abs()", "t7-check"),
    ("set2", "t7-solution", "(two[0].T @ one[0]) * (two[1] @ one[1].T)", "(one[0] @ one[1]) * (two[0] @ two[1])",
     "t7-check"),  # m x n
    ("set2", "t7-solution", "(up[:, None] * left[rows], right[:, columns] * along)", "(left[rows], right[:, columns])",
     "t7-check"),  # no signs
    ("set2", "t7-solution", "up[:, None] * left[rows], right[:, columns] * along",
     "torch.randn(left.shape, generator=g), torch.randn(right.shape, generator=g)", "t7-check"),  # another matrix
    ("set2", "t8-solution", "return inner.square() / (left * right)",
     "return (inner.square() / (left * right)).detach()", "t8-check"),
    ("set2", "t8-solution", "B0, A0, dA = B0.detach(), A0.detach(), dA.detach()", "pass", "t8-check"),
    ("set2", "t8-solution", "if min(left, right) < 1e-16", "if False", "t8-check"),  # nan
    ("set2", "t8-solution", "return 0.0 * B.sum()", "return torch.tensor(0.0)", "t8-check"),  # no gradient at all
    ("set2", "t8-solution", "(left * right)", "((B0.T @ D).square().sum() * (dA @ A0.T).square().sum())", "t8-check"),
    ("set2", "t8-solution", "(A - A0).detach()", "(A - A0)", "t8-check"),
    ("set3", "t1-solution", ".norm(dim=0)", ".amax(dim=0)", "t1-check"),  # the longest tensor alone
    ("set3", "t1-solution", ".clamp(max=1)", "", "t1-check"),  # short gradients are stretched
    ("set3", "t1-solution", "(C / lengths).clamp(max=1)", "torch.full_like(lengths, min(1.0, C / norm({k: g.mean(0)"
     " for k, g in gradients.items()})))", "t1-check"),  # the batch mean is clipped
    ("set3", "t2-solution", "/ (q * n)", "/ max(1, len(rows))", "t2-check"),  # tells how many came
    ("set3", "t2-solution", "(torch.rand(n, generator=g) < q).nonzero().flatten()",
     "torch.randperm(n, generator=g)[: max(1, round(q * n))]", "t2-check"),  # a fixed batch
    ("set3", "t2-solution", "sigma * C * noise", "sigma * noise", "t2-check"),
    ("set3", "t2-solution", "clipped_sum({name: each[rows] for name, each in gradients.items()}, C)",
     "{name: each[rows].sum(0) for name, each in gradients.items()}\n    C = 1.0", "t2-check"),
    ("set3", "t3-renyi-solution", "k * (k - 1)", "k * k", "t3-renyi-check"),
    ("set3", "t3-renyi-solution", " / (order - 1)", "", "t3-renyi-check"),
    ("set3", "t3-renyi-solution", "torch.xlogy(order - k, torch.tensor(1.0 - q)) + ", "", "t3-renyi-check"),
    ("set3", "t3-spent-solution", "times * renyi", "renyi", "t3-spent-check"),
    ("set3", "t3-spent-solution", "- math.log(delta * a)", "- math.log(delta)", "t3-spent-check"),
    ("set3", "t3-noise-solution", "return high", "return low", "t3-noise-check"),
    ("set3", "t3-noise-solution", "1.0005", "1.05", "t3-noise-check"),
    ("set3", "t4-solution", "m * s_B**2", "n * s_B**2", "t4-check"),
    ("set3", "t4-solution", "m * n * r * s_A**2", "m * n * s_A**2", "t4-check"),
    ("set3", "t4-solution", "math.sqrt(float", "(float", "t4-check"),
    ("set3", "t5-solution", 'k["B"] ** 0.5 * s', 'k["B"] * s', "t5-check"),
    ("set3", "t5-solution", 'if k["A"] == k["B"] else None', 'if k["A"] or k["B"] else None', "t5-check"),
    ("set3", "t5-solution", '["AB"] * k["B"]', 'schedule', "t5-check"),
    ("set3", "t6-smooth-solution", "x[..., :2].flip(-1)", "0 * x[..., :2]", "t6-smooth-check"),
    ("set3", "t6-smooth-solution", "(1, 4, 6, 4, 1)", "(1, 3, 8, 3, 1)", "t6-smooth-check"),
    ("set3", "t6-smooth-solution", "return sum(parts).movedim(-1, axis)", "return sum(parts)", "t6-smooth-check"),
    ("set3", "t6-effect-solution", ".sum() ** 2", ".sum()", "t6-effect-check"),
    ("set3", "t6-effect-solution", "F.square().sum() / len(F)", "F.square().sum()", "t6-effect-check"),
    ("set3", "t7-many-solution", "(1 - confidence) / 2", "1 - confidence", "t7-many-check"),
    ("set3", "t7-many-solution", "beta.ppf(tail, hits, members - hits + 1) if hits else 0.0", "hits / members",
     "t7-many-check"),  # as if the rates were known
    ("set3", "t7-many-solution", ", (1 - high, 1 - low)", ",", "t7-many-check"),  # one accusation
    ("set3", "t7-one-solution", "1 - confidence,", "(1 - confidence) / 2,", "t7-one-check"),
    ("set3", "t7-one-solution", "math.log(p / (1 - p))", "math.log(2 * p)", "t7-one-check"),
]  # fmt: skip


# The same columns; these pass what the student sees and fail what is hidden.
SUBTLE = [
    ("set1", "t1-solution", ".clamp(min=0)", ".clamp(min=0).double()", "t1-check"),
    ("set1", "t2-solution", "(BG * A).sum(dim=1)", "(BG * A).sum(dim=1) * (v != 0)", "t2-check"),
    ("set1", "t3-solution", "conv.in_channels, *conv.kernel_size", "4, 3, 3", "t3-check"),
    ("set1", "t4-solution", "rho * lam), B", "rho * lam) * (v != 0), B", "t4-check"),
    ("set1", "t5-rescaled-solution", "A, v / c, c * B", "c * A, v / c, B", "t5-rescaled-check"),
    ("set1", "t5-gauge-solution", "(a == 0) | (b == 0)", "b == 0", "t5-gauge-check"),
    ("set1", "t6-solution", "(v != 0)", "(v.abs() > 1e-8)", "t6-check"),
    ("set1", "t7-solution", "torch.linalg.svdvals(W)\n    return", "torch.linalg.eigvalsh(W).flip(0)\n    return",
     "t7-check"),  # as if every matrix were symmetric
    ("set1", "t8-solution", "kept = v != 0", "kept = (v != 0) | (v == 0).all()", "t8-check"),
    ("set2", "t1-solution", "state[name].double()", "state[name]", "t1-check"),  # single precision
    ("set2", "t1-solution", ".to(first.dtype)", "", "t1-check"),
    ("set2", "t2-lost-solution", "B - torch.tensordot(p, B, 1)", "B.sub_(torch.tensordot(p, B, 1))", "t2-lost-check"),
    ("set2", "t2-error-solution", "((L.T @ L) * (N @ N.T)).sum()", "(N.T @ (L.T @ L) @ N).trace()", "t2-error-check"),
    ("set2", "t3-solution", "own |= moved", "own = moved", "t3-check"),  # forgets in what sites differ already
    ("set2", "t4-solution", "rank / len(A) * B", "rank // len(A) * B", "t4-check"),
    ("set2", "t4-solution", "share * R / len(A)", "share * (R // len(A))", "t4-check"),
    ("set2", "t5-solution", '("A" if n < m else "B") if tie else ', "", "t5-check"),
    ("set2", "t5-solution", "min(e, key=e.get)", '"B" if region == "encoder" else "A"', "t5-check"),
    ("set2", "t6-solution", "for factor in factors}", "for factor in factors[:1]}", "t6-check"),
    ("set2", "t7-solution", "left[rows], right[:, columns]", "left, right", "t7-check"),  # signs alone
    ("set2", "t8-solution", "min(left, right)", "right", "t8-check"),  # nan at B = B0
    ("set2", "t8-solution", "< 1e-16", "< 1e-8", "t8-check"),  # asleep while the drift is small
    ("set3", "t1-solution", "(C / lengths).clamp(max=1)", "C / lengths.clamp(min=C)", "t1-check"),  # C = inf
    ("set3", "t2-solution", "torch.randn(value.shape, generator=g)", "torch.randn(value.shape)", "t2-check"),
    ("set3", "t3-renyi-solution", "torch.xlogy(order - k, torch.tensor(1.0 - q))", "(order - k) * math.log1p(-q)",
     "t3-renyi-check"),  # q = 1
    ("set3", "t3-spent-solution", "if history else 0.0", "", "t3-spent-check"),
    ("set3", "t3-noise-solution", "0.1, 1000.0", "0.1, 10.0", "t3-noise-check"),
    ("set3", "t4-solution", "s_A**2 * s_B**2", "s_B**4", "t4-check"),
    ("set3", "t5-solution", '["AB"] * k["B"]', '["AB"] * (len(schedule) // 2)', "t5-check"),
    ("set3", "t6-smooth-solution", "x[..., :2].flip(-1)", "x[..., 1:3].flip(-1)", "t6-smooth-check"),  # not the end
    ("set3", "t6-effect-solution", "float(F.square().sum() / len(F))", "70 / 256", "t6-effect-check"),
    ("set3", "t7-many-solution", "(right - delta)", "right", "t7-many-check"),
    ("set3", "t7-one-solution", "max(0.0, math.log(p / (1 - p)))", "math.log(p / (1 - p))", "t7-one-check"),
]  # fmt: skip


def stored(version: str, name: str) -> Any:
    return nbformat.read(assignments.FOLDER / version / f"{name}.ipynb", as_version=4)


def by_id(nb: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in nb.cells}


def code_cells(nb: Any) -> list[Any]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tasks(nb: Any) -> dict[str, list[Any]]:
    """The cells under each heading of a task."""
    found: dict[str, list[Any]] = {}
    heading = ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"(?m)^## .*", cell.source)][-1]
        if heading.startswith("## Task"):
            found.setdefault(heading, []).append(cell)
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A problem set may choose PyTorch's default dtype and threads; the next test gets its own back."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def grade(nb: Any, *checks: str) -> str:
    """The first cell that raises, and what, when all cells but other checks run in order; "" if none does."""
    names: dict[str, Any] = {}
    wanted = set(checks)
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in code_cells(nb):
            other = assignments.graded(cell) and cell.id not in wanted
            if other or "needs-solution" in cell.metadata.get("tags", []):
                continue
            try:
                exec(compile(cell.source, cell.id, "exec"), names)
            except Exception as error:
                return f"{cell.id}: {type(error).__name__}: {error}"
            wanted.discard(cell.id)
            if not wanted:
                return ""
    raise LookupError(f"no cell {wanted}")


def broken(name: str, solution: str, right: str, wrong: str) -> Any:
    """The stored solution with one piece of code replaced."""
    nb = stored("solution", name)
    cell = by_id(nb)[solution]
    assert cell.source.count(right) == 1
    cell.source = cell.source.replace(right, wrong)
    return nb


def nbval(version: str, name: str, tmp_path: Path) -> tuple[set[str], set[str]]:
    """Ids of the cells that pass and that fail when nbval runs the stored notebook."""
    report = tmp_path / "report.xml"
    path = assignments.FOLDER / version / f"{name}.ipynb"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        str(path),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=project.ROOT, capture_output=True, text=True,
        env=os.environ | project.kernel_environment(threads=1),
    )  # fmt: skip
    cells = code_cells(stored(version, name))
    passed: set[str] = set()
    failed: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase"):
        ident = cells[int(case.attrib["name"].removeprefix("Cell "))].id
        (failed if list(case.iter("failure")) or list(case.iter("error")) else passed).add(ident)
    assert passed | failed == {cell.id for cell in cells}, done.stdout
    return passed, failed


# --- the stored notebooks -----------------------------------------------------------------------------------------


def test_stored_problem_sets_are_what_their_sources_say() -> None:
    assert SETS and assignments.drift() == [], "run: make assignments"


@pytest.mark.parametrize("name", SETS)
def test_every_problem_set_can_be_downloaded_from_its_page_and_its_solution_cannot(name: str) -> None:
    page = (project.BOOK / "assignments.md").read_text(encoding="utf-8")
    assert f"<assignments/release/{name}.ipynb>" in page
    assert "solution/" not in page


@pytest.mark.parametrize("name", SETS)
def test_both_versions_are_valid_and_ids_agree(name: str) -> None:
    whole, student = stored("solution", name), stored("release", name)
    for nb in (whole, student):
        nbformat.validate(nb)
        assert not [cell for cell in code_cells(nb) if cell.outputs or cell.execution_count]
        assert str(project.ROOT) not in nbformat.writes(nb)
    assert [cell.id for cell in whole.cells] == [cell.id for cell in student.cells]
    assert assignments.problems(whole.cells) == []
    assert whole.cells[0].source == student.cells[0].source and "google.colab" in whole.cells[0].source


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_student_version_fails_exactly_where_a_solution_is_missing(name: str, tmp_path: Path) -> None:
    cells = code_cells(stored("release", name))
    expected = {cell.id for cell in cells if assignments.needs_solution(cell)}
    passed, failed = nbval("release", name, tmp_path)
    assert expected and failed == expected
    assert passed == {cell.id for cell in cells} - expected != set()


@pytest.mark.parametrize("name", SETS)
def test_the_student_version_holds_no_line_of_a_solution_or_hidden_test(name: str) -> None:
    secret = set()
    for cell in stored("solution", name).cells:
        for what in ("SOLUTION", "HIDDEN TESTS"):
            secret |= {line.strip() for line in assignments.inside(cell.source, what)}
    secret = {line for line in secret if re.search(r"\w", line)}
    assert len(secret) > 20
    text = nbformat.writes(stored("release", name))
    shown = {line.strip() for cell in stored("release", name).cells for line in cell.source.split("\n")}
    assert secret & shown == set()
    assert not re.search(r"(BEGIN|END) (SOLUTION|HIDDEN)", text)


@pytest.mark.parametrize("name", SETS)
def test_every_missing_solution_is_a_stub_at_its_place(name: str) -> None:
    whole, student = by_id(stored("solution", name)), by_id(stored("release", name))
    for ident, cell in whole.items():
        regions = cell.source.count("### BEGIN SOLUTION")
        stub = "raise NotImplementedError()" if cell.cell_type == "code" else assignments.TEXT_STUB
        assert student[ident].source.count(stub) == regions
        if cell.cell_type == "code":
            compile(student[ident].source, ident, "exec")


@pytest.mark.parametrize("name", SETS)
def test_points_add_up(name: str) -> None:
    nb = stored("solution", name)
    total = 0
    for heading, cells in tasks(nb).items():
        points = sum(c.metadata["nbgrader"]["points"] for c in cells if assignments.graded(c))
        assert f"({points} points)" in heading
        total += points
    assert f"{total} points" in nb.cells[1].source, "the first text states the sum"
    assert f"| {total} |" in (project.BOOK / "assignments.md").read_text(encoding="utf-8"), "so does the page"
    listed: dict[str, int] = {}
    exec(by_id(nb)["points"].source.partition("\nfor ")[0], listed)
    checks = {c.id: c.metadata["nbgrader"]["points"] for c in code_cells(nb) if assignments.graded(c)}
    assert listed["POINTS"] == checks, "the table of the self-assessment"


@pytest.mark.parametrize("name", SETS)
def test_every_task_has_visible_and_hidden_checks_that_report_themselves(name: str) -> None:
    for heading, cells in tasks(stored("solution", name)).items():
        checks = [cell for cell in cells if cell.cell_type == "code" and assignments.graded(cell)]
        assert checks and any(assignments.is_solution(cell) for cell in cells), heading
        for cell in checks:
            hidden = assignments.inside(cell.source, "HIDDEN TESTS")
            visible = assignments.replace(cell.source, "HIDDEN TESTS")
            assert any(line.strip().startswith("assert ") for line in hidden), cell.id
            assert len(re.findall(r"(?m)^ *assert ", visible)) > 1, cell.id
            assert visible.endswith(f'passed.add("{cell.id}")'), cell.id


# --- the checks catch wrong answers --------------------------------------------------------------------------------


COLUMNS = ("name", "solution", "right", "wrong", "check")


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, MUTANTS)
def test_a_wrong_solution_is_caught_by_the_visible_check(
    name: str, solution: str, right: str, wrong: str, check: str
) -> None:
    nb = broken(name, solution, right, wrong)
    by_id(nb)[check].source = by_id(stored("release", name))[check].source
    assert grade(nb, check).startswith(f"{check}: AssertionError")


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, SUBTLE)
def test_a_solution_for_the_visible_check_only_is_caught_by_the_hidden_one(
    name: str, solution: str, right: str, wrong: str, check: str
) -> None:
    nb = broken(name, solution, right, wrong)
    assert grade(nb, check).startswith(f"{check}: ")
    by_id(nb)[check].source = by_id(stored("release", name))[check].source
    assert grade(nb, check) == ""


@pytest.mark.parametrize("table", [MUTANTS, SUBTLE], ids=["visible", "hidden"])
@pytest.mark.parametrize("name", SETS)
def test_every_check_is_tried_with_a_wrong_solution(name: str, table: list[tuple[str, ...]]) -> None:
    checks = {cell.id for cell in code_cells(stored("solution", name)) if assignments.graded(cell)}
    assert {check for owner, *_, check in table if owner == name} == checks


@pytest.mark.parametrize("name", SETS)
def test_the_right_solution_passes_where_wrong_ones_fail(name: str) -> None:
    """Here in one process; `make nbval` runs every cell of the solutions in a kernel."""
    nb = stored("solution", name)
    assert grade(nb, *(cell.id for cell in code_cells(nb) if assignments.graded(cell))) == ""


# --- the maker -----------------------------------------------------------------------------------------------------

SOURCE = """\
# Set

## Task 1 (3 points)

+++ {"nbgrader": {"grade_id": "say", "grade": true, "solution": true, "points": 1}}

Your answer:

### BEGIN SOLUTION
Because.
### END SOLUTION

+++

Then code.

```{code-cell} ipython3
:nbgrader: {grade_id: do, solution: true}
def one():
    if True:
        ### BEGIN SOLUTION
        return 1
        ### END SOLUTION


one()
```

```{code-cell} ipython3
:nbgrader: {grade_id: check, grade: true, points: 2}
assert one() > 0
### BEGIN HIDDEN TESTS
assert one() == 1
### END HIDDEN TESTS
```
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set9.md").write_text(SOURCE)
    return tmp_path


def test_what_the_student_sees(folder: Path) -> None:
    cells = by_id(assignments.versions(folder / "set9.md")["release"])
    assert cells["say"].source == "Your answer:\n\nYOUR ANSWER HERE"
    stub = "        # YOUR CODE HERE\n        raise NotImplementedError()"
    assert cells["do"].source == f"def one():\n    if True:\n{stub}\n\n\none()"
    assert cells["check"].source == "assert one() > 0"
    locks = {ident: (c.metadata.get("deletable"), c.metadata.get("editable")) for ident, c in cells.items()}
    assert locks["do"] == locks["say"] == (False, None) and locks["check"] == locks["setup"] == (False, False)


def test_defaults_are_nbgrader_s(folder: Path) -> None:
    cells = by_id(assignments.solution(folder / "set9.md"))
    assert cells["do"].metadata["nbgrader"] == VALID | {"grade_id": "do"}
    checked = VALID | {"grade": True, "solution": False, "locked": True, "grade_id": "check", "points": 2}
    assert cells["check"].metadata["nbgrader"] == checked


def test_an_edit_moves_no_other_id(folder: Path) -> None:
    before = [cell.id for cell in assignments.solution(folder / "set9.md").cells]
    (folder / "set9.md").write_text(SOURCE.replace("return 1", "return 2 - 1").replace("Then code", "Now code"))
    after = [cell.id for cell in assignments.solution(folder / "set9.md").cells]
    assert len(set(before)) == len(before) and [a == b for a, b in zip(before, after, strict=True)].count(False) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("### END SOLUTION\n```", "```", "no ### END SOLUTION"),
        ("        ### BEGIN SOLUTION\n", "", "where it cannot be"),
        ("### BEGIN SOLUTION\n        return", "# BEGIN SOLUTION\n        return", "is no marker"),
        (", solution: true}", ", locked: true}", "not marked for it"),
        ("grade_id: do, ", "", "no 'grade_id'"),
        ("grade_id: do,", "grade_id: do it,", "letters, digits"),
        ("grade_id: do,", "grade_id: check,", "used twice"),
        ("grade_id: do,", "grade_id: do, points: 2,", "'points' does not belong here"),
        ("grade_id: do,", "grade_id: do, colour: red,", "'colour' does not belong here"),
        ("grade_id: do,", "grade_id: do, schema_version: 2,", "schema_version has to be 3"),
        ("grade_id: do,", "grade_id: do, cell_type: markdown,", "the cell_type is another"),
        ("grade_id: do,", "grade_id: do, locked: true,", "cannot write"),
        ("grade: true, points: 2", "grade: true", "no 'points'"),
        ("grade: true, points: 2", "grade: true, points: 0", "more than 0 points"),
        ("grade: true, points: 2", "grade: true, points: true", "'points' is True"),
        ("grade: true, points: 2", "grade: true, points: 2, locked: false", "has to be locked"),
        ('"grade": true, "solution": true, "points": 1', '"solution": true', "needs grade: true"),
    ],
)
def test_a_set_that_nbgrader_would_refuse_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    text = SOURCE.replace(old, new) if old in SOURCE else SOURCE.replace(old.replace("\n```", "\n\n\none()\n```"), new)
    assert text != SOURCE
    (folder / "set9.md").write_text(text)
    with pytest.raises(assignments.AssignmentError, match=re.escape(message)):
        assignments.solution(folder / "set9.md")


@pytest.mark.parametrize("markup", ["{cite}`dice1945`", "```{note}\nx\n```"])
def test_text_is_plain_markdown(folder: Path, markup: str) -> None:
    (folder / "set9.md").write_text(SOURCE.replace("Then code.", markup))
    with pytest.raises(ValueError, match="plain Markdown"):
        assignments.solution(folder / "set9.md")


def test_drift_sees_an_edit_a_missing_and_a_left_over_notebook(folder: Path) -> None:
    assert assignments.drift(folder) == ["release/set9.ipynb: missing", "solution/set9.ipynb: missing"]
    for version, nb in assignments.versions(folder / "set9.md").items():
        (folder / version).mkdir()
        nbformat.write(nb, folder / version / "set9.ipynb")
    assert assignments.drift(folder) == []
    (folder / "set9.md").write_text(SOURCE.replace("return 1", "return 2 - 1"))
    assert assignments.drift(folder) == ["solution/set9.ipynb: differs from set9.md"]
    (folder / "set9.md").unlink()
    assert assignments.drift(folder) == [
        f"{v}/set9.ipynb: no problem set of this name" for v in ("release", "solution")
    ]


def test_unknown_set_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert assignments.main(["nothing"]) == 2
    assert "problem sets: set1" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("nbgrader"), reason="no nbgrader on this machine: it is not needed, only tried")
@pytest.mark.parametrize("name", SETS)
def test_nbgrader_makes_the_same_student_version(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source" / name
    source.mkdir(parents=True)
    shutil.copy(assignments.FOLDER / "solution" / f"{name}.ipynb", source)
    subprocess.run(["nbgrader", "generate_assignment", name], cwd=tmp_path, check=True, capture_output=True)
    theirs = nbformat.read(tmp_path / "release" / name / f"{name}.ipynb", as_version=4)
    for cell in theirs.cells:
        cell.metadata.get("nbgrader", {}).pop("checksum", None)
    assert assignments.content(theirs) == assignments.content(stored("release", name))
