"""The rendered book in a browser that can reach nobody: no request leaves, nothing fails, mathematics and widgets live.

Build the book first (`python book/_tools/build.py`). Each page is opened over http from this machine and as a file.
"""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora_mini.adapters import ADAPTERS
from fedlora_mini.federation import METHODS
from fedlora_mini.widgets import ProductNoise, SoftThreshold, SubspaceLeakage

HTML = Path(__file__).resolve().parents[2] / "build" / "_build" / "html"
PAGES = sorted(
    p.relative_to(HTML).as_posix()
    for p in HTML.rglob("*.html")
    if not {"_static", "_sources"} & {*p.parts} and p != HTML / "index.html"  # that one only leads on
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip
RENDERED = "[...document.querySelectorAll('.math')].every((e) => e.querySelector('mjx-container'))"
TOO_WIDE = """() => [...document.querySelectorAll('div.math, mjx-container[display="true"]')]
  .filter((e) => e.scrollWidth > e.clientWidth + 2).map((e) => e.closest("[id]").id)"""

playwright_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
    pytest.mark.skipif(not PAGES, reason="the book is not built: python book/_tools/build.py"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright_api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        yield context
        context.close()


class Visit:
    """A page with a record of what it asked for and what went wrong."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 900) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url, wait_until="load")
        if self.page.locator(".math").count():
            self.page.wait_for_function(RENDERED)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


@pytest.fixture(params=["http", "file"])
def base(request: pytest.FixtureRequest, served: str) -> str:
    return served if request.param == "http" else HTML.as_uri()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole_without_network(browser: Any, base: str, name: str) -> None:
    with Visit(browser, f"{base}/{name}") as visit:
        outside = [url for url in visit.requests if not url.startswith((base, "data:", "blob:"))]
        assert visit.requests and not outside
        assert not visit.errors
        math = visit.page.locator(".math").count()
        assert visit.page.locator(".math mjx-container").count() >= math, "mathematics that was not rendered"
        assert not visit.page.locator("mjx-merror, [data-mjx-error]").count(), "mathematics with an error"
        assert not visit.page.evaluate(TOO_WIDE), "formulas of which a part is hidden"


@pytest.mark.parametrize("name", PAGES)
def test_no_markup_shows_through(browser: Any, name: str) -> None:
    """Dollars, braces and fences in running text are markup that the build did not understand."""
    with Visit(browser, f"{HTML.as_uri()}/{name}") as visit:
        text = visit.page.evaluate(
            """() => {
              const copy = (document.querySelector("article") || document.body).cloneNode(true);
              copy.querySelectorAll("pre, code, mjx-container, script, style, svg").forEach((e) => e.remove());
              return copy.textContent;
            }"""
        )
        assert not [mark for mark in ("$", "{eq}", "{ref}", "{numref}", "{cite", "{prf:", ":::", "```") if mark in text]


def test_the_index_leads_to_the_first_page(browser: Any, base: str) -> None:
    page, requests = browser.new_page(), []
    page.on("request", lambda r: requests.append(r.url))
    page.goto(f"{base}/index.html", wait_until="commit")
    page.wait_for_url("**/intro.html", timeout=20_000)
    assert page.locator("article h1").count() == 1
    assert all(url.startswith((base, "data:")) for url in requests)
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(browser: Any, name: str) -> None:
    with Visit(browser, f"{HTML.as_uri()}/{name}", width=390, height=844) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390


WIDGET_PAGES = [name for name in PAGES if 'class="fl-widget"' in (HTML / name).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WIDGET_PAGES)
def test_keys_move_a_widget_s_picture_and_text(browser: Any, base: str, name: str) -> None:
    with Visit(browser, f"{base}/{name}") as visit:
        widgets = visit.page.locator(".fl-widget")
        for i in range(widgets.count()):
            widget = widgets.nth(i)
            sliders = widget.locator("input[type=range]")
            assert sliders.count() and widget.locator("svg[role=img][aria-label]").count()
            for j in range(sliders.count()):

                def seen(widget: Any = widget) -> tuple[str, str]:
                    picture = "".join(
                        widget.locator("svg").nth(k).inner_html() for k in range(widget.locator("svg").count())
                    )
                    return picture, widget.locator("[aria-live]").inner_text()

                before = seen()
                sliders.nth(j).focus()
                for _ in range(6):
                    visit.page.keyboard.press("ArrowRight")
                after = seen()
                assert before[0] != after[0] and before[1] != after[1], f"slider {j} of widget {i}"
        assert not visit.errors


def test_the_arena_page_s_widget_shows_what_the_library_computes(browser: Any, base: str) -> None:
    """The chapter's spectrum is the default one; the thresholds are reached by keys."""
    with Visit(browser, f"{base}/05_arena.html") as visit:
        assert visit.page.locator(".math mjx-container").count() > 100
        widget = visit.page.locator(".fl-widget")
        assert widget.count() == 1
        slider, ranks = widget.locator("input[type=range]").first, set()
        slider.focus()
        for _ in range(10):
            for _ in range(5):
                visit.page.keyboard.press("ArrowRight")
            tau = float(slider.input_value())
            expected = SoftThreshold(tau=tau, step=8).result
            text = widget.locator("[aria-live]").inner_text()
            assert f"τ = {tau:.2f}: {expected['rank']} of 8 directions survive" in text
            assert f"nuclear norm Σ|ξ(vᵢ, τ)| = {expected['nuclear_norm']:.2f} " in text
            assert f"rank {expected['rank_at_step']}, nuclear norm {expected['nuclear_norm_at_step']:.2f}." in text
            assert widget.locator("svg").first.locator("rect.fl-kept").count() == expected["rank"]
            ranks.add(expected["rank"])
        assert len(ranks) >= 5 and 0 in ranks
        assert not [url for url in visit.requests if not url.startswith((base, "data:", "blob:"))]
        assert not visit.errors


def test_the_leakage_page_s_widget_shows_what_the_library_computes(browser: Any, base: str) -> None:
    """From the chapter's settings, one slider after another: the sentence and the table."""
    weights, state = [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10], SubspaceLeakage()
    with Visit(browser, f"{base}/11_leakage.html") as visit:
        widget = visit.page.locator(".fl-widget")
        assert widget.count() == 1 and widget.locator("svg").count() == 3
        for i, (name, presses) in enumerate((("theta", 3), ("rank", 2), ("sites", 3), ("lam", 2), ("step", 5))):
            slider = widget.locator("input[type=range]").nth(i)
            slider.focus()
            for _ in range(presses):
                visit.page.keyboard.press("ArrowRight")
            value = float(slider.input_value())
            setattr(state, name, weights[int(value)] if name == "lam" else value if name == "theta" else int(value))
            expected = state.result
            text = widget.locator("[aria-live]").inner_text()
            assert f"r = {state.rank}, K = {state.sites}, λ = {state.lam:g}, local steps: {state.step}." in text
            cells = [float(x) for x in widget.locator("td").all_inner_texts() if x]
            columns = (expected, expected["without"], expected["chance"])
            names = ("leak_cos2", "leak_explained", "overlap", "drift")
            assert cells == pytest.approx([c[key] for key in names for c in columns if key in c], abs=6e-4)
            assert widget.locator("svg").first.locator("line.fl-now").count() == state.rank, "a fan for every angle"
        assert (state.theta, state.rank, state.sites, state.lam, state.step) == (60.0, 4, 7, 3.0, 17)
        assert not [url for url in visit.requests if not url.startswith((base, "data:", "blob:"))]
        assert not visit.errors


def test_the_noise_page_s_widget_shows_what_the_library_computes(browser: Any, base: str) -> None:
    """From the chapter's settings, one slider after another: the sentence and the table. Alternating equals half."""
    ranks = [2, 4, 8, 16, 32]
    state = ProductNoise(sigma_B=0.02, sigma_A=0.02, rank=8, norm_B=2.0, norm_A=2.0, steps=20)
    moves = (("sigma_B", 2), ("sigma_A", 3), ("rank", 1), ("norm_B", 3), ("norm_A", 1), ("steps", 4))
    with Visit(browser, f"{base}/16_noise_in_ba.html") as visit:
        widget = visit.page.locator(".fl-widget")
        assert widget.count() == 1 and widget.locator("svg").count() == 3
        for i, (name, presses) in enumerate(moves):
            slider = widget.locator("input[type=range]").nth(i)
            slider.focus()
            for _ in range(presses):
                visit.page.keyboard.press("ArrowRight")
            value = float(slider.input_value())
            setattr(state, name, ranks[int(value)] if name == "rank" else int(value) if name == "steps" else value)
            expected = state.result
            text = widget.locator("[aria-live]").inner_text()
            assert f"r = {state.rank}, K = {state.steps}." in text
            assert all(f"{arm} {total:.3f}" in text for arm, total in expected["total"].items())
            cells = [float(x) for x in widget.locator("td").all_inner_texts()]
            rows = [[*expected["terms"][a], expected["total"][a], expected["snr"][a]] for a in expected["total"]]
            assert cells == pytest.approx([x for row in rows for x in row], abs=6e-4)
            assert cells[5:9] == cells[10:14], "alternating, and half as many of both"
        assert (state.sigma_B, state.sigma_A, state.rank, state.steps) == (0.03, 0.035, 16, 28)
        assert not [url for url in visit.requests if not url.startswith((base, "data:", "blob:"))]
        assert not visit.errors


@pytest.mark.parametrize("name", WIDGET_PAGES)
def test_a_widget_follows_dark_mode(browser: Any, name: str) -> None:
    with Visit(browser, f"{HTML.as_uri()}/{name}") as visit:
        text = visit.page.locator(".fl-widget svg text").first
        colours = []
        for theme in ("light", "dark"):
            visit.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            visit.page.wait_for_timeout(700)  # the theme fades from one to the other
            colours.append(text.evaluate("e => getComputedStyle(e).fill"))
        assert colours[0] != colours[1]


@pytest.mark.parametrize(
    ("name", "figures"), [("04_adapter_zoo.html", 5), ("06_choosing_a_rank.html", 8), ("08_method_table.html", 13)]
)
def test_every_picture_of_the_table_chapters_is_drawn_and_numbered(browser: Any, name: str, figures: int) -> None:
    with Visit(browser, f"{HTML.as_uri()}/{name}") as visit:
        pictures = visit.page.locator("article figure:has(.caption-number) img")
        assert pictures.count() == figures
        for i in range(figures):
            pictures.nth(i).scroll_into_view_if_needed()
            assert pictures.nth(i).evaluate("async (e) => { await e.decode(); return e.naturalWidth; }") > 300


def test_the_zoo_s_table_has_every_adapter_of_the_library(browser: Any) -> None:
    with Visit(browser, f"{HTML.as_uri()}/04_adapter_zoo.html") as visit:
        rows = visit.page.locator("table.dataframe th").all_inner_texts()
        assert {name for name, row in ADAPTERS.items() if not row.federated} <= {text.strip() for text in rows}


def test_the_method_table_s_page_has_every_row_of_the_library(browser: Any) -> None:
    with Visit(browser, f"{HTML.as_uri()}/08_method_table.html") as visit:
        rows = visit.page.locator("table.dataframe th").all_inner_texts()
        assert {row.title for row in METHODS.values()} <= {text.strip() for text in rows}
        shown = "\n".join(visit.page.locator("article .output pre, article .cell_output pre").all_inner_texts())
        assert '"fedit": Method("FedIT", "lora", everything)' in shown and "def factors(" in shown
