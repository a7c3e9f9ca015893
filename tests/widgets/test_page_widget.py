"""What every widget keeps: two hosts, nothing loaded, the same output at each build."""

import json
import re
import subprocess
import sys
from itertools import count

import pytest

from fedlora_mini import widgets
from fedlora_mini.widgets import PageWidget

WIDGETS = [
    w for w in vars(widgets).values() if isinstance(w, type) and issubclass(w, PageWidget) and w is not PageWidget
]


@pytest.fixture(autouse=True)
def fresh_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageWidget, "_displayed", count(1))


@pytest.mark.parametrize("kind", WIDGETS)
def test_a_module_exports_one_default_and_loads_nothing(kind: type[PageWidget]) -> None:
    source = str(kind._esm)
    assert re.findall(r"(?m)^export\b.*?\{", source) == ["export default {"] and source.count("export ") == 1
    assert re.search(r"export default \{ render, math: \{", source), "render for the hosts, math for the test in node"
    assert not re.search(
        r"(?m)^\s*import\b|\bimport\(|\bfetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", source
    )
    assert "</script" not in source
    for needed in ("stopPropagation", "aria-live", "aria-label", '"role", "img"', "currentColor", "var(--"):
        assert needed in source, needed


@pytest.mark.parametrize("kind", WIDGETS)
def test_the_fragment_holds_the_state_and_has_a_stable_id(kind: type[PageWidget]) -> None:
    first, second = kind().html(), kind().html()
    assert 'id="fl-widget-1"' in first and 'getElementById("fl-widget-2")' in second
    assert first.replace("fl-widget-1", "X") == second.replace("fl-widget-2", "X")
    assert json.loads(re.search(r"const state = (\{.*?\}), listeners", first)[1]) == kind().state()  # type: ignore[index]
    assert "export " not in first
    assert len(first) < 16_000


@pytest.mark.parametrize("kind", WIDGETS)
def test_the_bundle_serves_both_hosts(kind: type[PageWidget], monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = kind()._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(data)
    assert data["text/plain"] == repr(kind()) and "0x" not in repr(kind())
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    data, _ = kind()._repr_mimebundle_()
    assert "text/html" not in data, "Colab has a kernel: the live view alone"


def test_a_closing_tag_in_the_state_cannot_end_the_script() -> None:
    import traitlets as t

    class Note(PageWidget):
        _esm = "export default { render: ({ model, el }) => { el.textContent = model.get('text'); } };\n"
        text = t.Unicode("</script><b>").tag(sync=True)

    assert Note().html().count("</script>") == 1


def test_the_library_does_not_load_widgets() -> None:
    code = "import sys, fedlora_mini; sys.exit('anywidget' in sys.modules or 'ipywidgets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
