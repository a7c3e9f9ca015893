"""One ES module, two hosts: an anywidget where a kernel runs, the same code inlined where only a page is.

A widget is a class with public synced traits, and a module whose one export is `default { render, math }`:
`render({ model, el })` draws, `math` holds the formulas that a test compares with numpy.
"""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import anywidget

# The stand-in for the kernel's model: what `render` may ask of it, and no more.
STAND_IN = """\
const state = %(state)s, listeners = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; (listeners["change:" + name] ?? []).forEach((f) => f()); },
  save_changes: () => {},
  on: (event, f) => { (listeners[event] ??= []).push(f); },
  off: (event, f) => { listeners[event] = (listeners[event] ?? []).filter((g) => g !== f); },
};
widget.render({ model, el: document.getElementById("%(id)s") });
"""


def load(name: str) -> str:
    """The text of a widget's module, behind the parts that all share: one module, which imports nothing.

    Text, not a path: anywidget watches paths for edits, and the page inlines it.
    """
    folder = Path(__file__).parent
    return "\n".join((folder / each).read_text(encoding="utf-8") for each in ("parts.js", name))


class PageWidget(anywidget.AnyWidget):
    """An anywidget that also draws itself in a static page, with nothing loaded and no kernel.

    Subclasses set `_esm = load("<module>.js")`, public traits tagged `sync=True`, and `summary()`.
    """

    _displayed: ClassVar[count] = count(1)  # ids by order of display: the same build gives the same page
    _ipython_display_ = None  # ipywidgets 7 defines it, and IPython would prefer it to `_repr_mimebundle_`

    def state(self) -> dict[str, Any]:
        """The public synced traits, without the ones that every widget has (layout, tooltip)."""
        names = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names(sync=True))
        return {name: getattr(self, name) for name in sorted(names) if not name.startswith("_")}

    def summary(self) -> str:
        """One plain sentence: what a reader without JavaScript gets."""
        return repr(self)

    def html(self) -> str:
        """A fragment that runs by itself: an element, the module, the stand-in model."""
        ident = f"fl-widget-{next(self._displayed)}"
        # "</" would end the script element early, whatever the string it stands in
        state = json.dumps(self.state(), allow_nan=False).replace("</", "<\\/")
        module = str(self._esm).replace("export default", "const widget =", 1)
        script = module + STAND_IN % {"state": state, "id": ident}
        text = self.summary().replace("&", "&amp;").replace("<", "&lt;")
        return f'<div id="{ident}" class="fl-widget"><p>{text}</p></div>\n<script type="module">\n{script}</script>'

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.state().items())})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view where a front end can show it, and the fragment for the page that has no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None or "google.colab" in sys.modules:  # Colab always has the kernel: offer the live view alone
            return bundle
        data, metadata = bundle
        return data | {"text/html": self.html(), "text/plain": repr(self)}, metadata
