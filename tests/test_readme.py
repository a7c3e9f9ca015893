"""README's own adapter does what README says an adapter must, and the packages that it installs are declared once."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedlora_mini.adapters import ADAPTERS
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.federation import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = {
    "linear": (nn.Linear(4, 6), (2, 4)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 8, 8)),
}


@pytest.fixture
def example() -> Iterator[dict[str, object]]:
    """The names of the block that defines an adapter; the tables are as before afterwards."""
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class " in block]
    names: dict[str, object] = {}
    before = dict(ADAPTERS), dict(METHODS)
    exec(code, names)
    yield names
    for table, old in zip((ADAPTERS, METHODS), before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_own_adapter_serves_every_layer_merged_and_along_the_group_axis(kind, example):
    layer, shape = LAYERS[kind]
    adapter = example["Outer"](layer, torch.Generator().manual_seed(0))
    nn.init.normal_(adapter.b)
    x, (m, n) = torch.randn(3 * shape[0], *shape[1:]), (len(adapter.b), len(adapter.a))
    beside = adapter(x)
    adapter.merge()
    torch.testing.assert_close(adapter(x), beside, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    groups = {"a": torch.randn(3, n), "b": torch.randn(3, m)}
    each = [
        functional_call(adapter, {name: value[g] for name, value in groups.items()}, part)
        for g, part in enumerate(x.chunk(3))
    ]
    torch.testing.assert_close(functional_call(adapter, groups, x), torch.cat(each), rtol=1e-4, atol=1e-5)


def test_the_own_row_runs_and_a_client_s_adapter_is_saved(example, tmp_path):
    from fedlora_mini.adapters import load_state, save

    options = {"per_site": 4, "val": 1, "test": 1, "n_unseen": 0}
    small = {"sites": "2", "size": 16, "rounds": 1, "steps": 1, "batch": 2, "data_options": options}
    federation = Federation.build(RunConfig(method="fedouter", **small))
    [told] = federation.rounds()
    assert told.bytes_up > 0 and told.agg_err is None
    load_state(federation.model, federation.engine.personal(0, federation.server))
    assert (save(federation.model, tmp_path / "client0") / "adapter_model.safetensors").is_file()


def test_every_dependency_of_the_package_has_a_pin_that_fits_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)

    def number(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    for dependency in project["dependencies"]:
        name, least = dependency.split(">=")
        assert name in pins and number(pins[name]) >= number(least), dependency
