"""nbval over the book's notebooks: kernels that can start side by side, and outputs that the build takes over."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbval.kernel
import pytest
from nbval.plugin import IPyNbCell

sys.path.insert(0, str(Path(__file__).parent / "_tools"))
import executed
import kernels
import project

nbval.kernel.KernelManager = kernels.LocalKernel
PASSED = pytest.StashKey[list[IPyNbCell]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """After the last cell of a chapter, if every cell passed, its outputs are kept."""
    report = yield
    if isinstance(item, IPyNbCell) and item.path.parent == project.NOTEBOOKS and call.when == "call" and report.passed:
        nb, passed = item.parent.nb, item.parent.stash.setdefault(PASSED, [])
        passed.append(item)
        if len(passed) == sum(cell.cell_type == "code" for cell in nb.cells):
            for count, each in enumerate(passed):
                each.cell.outputs, each.cell.execution_count = each.test_outputs, count + 1
            executed.keep(item.path.stem, nb)
    return report
