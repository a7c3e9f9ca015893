"""The book's own Sphinx extension: everything a page needs is a local file, and every address comes from one setting.

- the repository's address (pyproject.toml) fills the theme's repository button, the Colab button and `{{ install }}`;
- the execution cache's path carries a hash of the package's sources and of the stored results;
- MathJax is copied out of the wheel of sphinx-mathjax-offline: one script and its fonts;
- `book/_assets` joins the static path (`_static` would be loaded file by file on every page);
- a chapter's Colab and download buttons lead to its plain notebook in `book/notebooks`.
"""

import os
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import project  # the tools are plain scripts, not a package

MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2")
# Sphinx-thebe and the theme each add their script on every page; without a Binder they can only fail.
# The widgets' state is for a manager that would come from a CDN; its random ids would change at every build.
UNUSED_SCRIPTS = ("thebe", "widget-state+json")


def configure(app: Sphinx, config: Config) -> None:
    """Runs before the builder exists: addresses, cache path, the environment that kernels inherit."""
    s = project.settings()
    config.html_theme_options |= s | {
        "path_to_docs": "book",
        "use_repository_button": True,
        "navbar_persistent": [],  # the theme's own search field is in the sidebar; this one would be a second
        "show_toc_level": 2,
    }
    config.myst_substitutions |= {
        "repository": s["repository_url"],
        "install": f"```sh\npip install {project.install_line()}\n```",
    }
    config.nb_execution_cache_path = str(project.cache_path())
    os.environ.update(project.kernel_environment())


def add_assets(app: Sphinx) -> None:
    app.config.html_static_path.append(str(Path(app.srcdir) / "_assets"))
    app.add_css_file("book.css")


def mathjax_files() -> Path:
    """The folder of MathJax in the wheel of sphinx-mathjax-offline (its package name is no Python identifier)."""
    found = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    return Path(str(found))


def copy_mathjax(outdir: Path) -> None:
    for name in MATHJAX:
        source, target = mathjax_files() / name, outdir / "_static" / "mathjax" / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def finish(app: Sphinx, error: Exception | None) -> None:
    """After the pages: MathJax, and each chapter's plain notebook under the name that the download button uses."""
    if error is not None or app.builder.format != "html":
        return
    outdir = Path(app.outdir)
    copy_mathjax(outdir)
    for notebook in sorted((Path(app.srcdir) / "notebooks").glob("*.ipynb")):
        if (outdir / "_sources" / notebook.name).exists():
            shutil.copyfile(notebook, outdir / "_sources" / notebook.name)


def colab_url(page: str) -> str:
    """Colab's address of a chapter: it opens .ipynb files of a public repository, and never the chapter's .md."""
    s = project.settings()
    repository = s["repository_url"].removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{repository}/blob/{s['repository_branch']}/book/notebooks/{page}.ipynb"


def adjust_page(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Runs after the theme (priority 901): correct the Colab link, drop doubled and useless scripts."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                button["url"] = colab_url(pagename)
    kept: dict[str, Any] = {}
    for script in context.get("script_files", []):
        attributes = getattr(script, "attributes", {})
        name = str(getattr(script, "filename", script) or "").split("?")[0]
        what = f"{name} {attributes.get('type', '')} {attributes.get('body', '')}"
        if not any(word in what.lower() for word in UNUSED_SCRIPTS):
            kept.setdefault(name or what, script)
    if "script_files" in context:
        context["script_files"] = list(kept.values())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", configure, priority=100)
    app.connect("builder-inited", add_assets)
    app.connect("html-page-context", adjust_page, priority=901)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
