"""Every label of the book with the number that the rendered page shows, and every citation: what links are made of.

Sphinx numbers within a chapter when its part is `numbered`, over all other pages together otherwise, in the order of
`_toc.yml`; equations count when they have a label, figures and tables when they have a caption.
"""

import codecs
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jupytext
import latexcodec  # noqa: F401 - registers the codec "ulatex"
import yaml
from flatten import DOLLARS, PROOFS, TARGET, MarkupError, blocks
from pybtex.database import Entry, parse_file

SHOWN = {"figure": "Fig.", "table": "Table", "equation": "Equation"}


@dataclass(frozen=True)
class Label:
    page: str
    kind: str
    number: str = ""
    title: str = ""

    @property
    def shown(self) -> str:
        return f"{SHOWN.get(self.kind, self.kind.capitalize())} {self.number}" if self.number else self.title


@dataclass(frozen=True)
class Citation:
    authors: str
    year: str
    url: str
    line: str


def pages_of_toc(folder: Path) -> list[tuple[str, str]]:
    """(page, chapter number or "") in reading order. Numbering runs on over the numbered parts."""
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    pages, chapter = [(toc["root"], "")], 0
    for part in toc.get("parts", [toc]):
        for entry in part.get("chapters", []):
            chapter += bool(part.get("numbered"))
            pages.append((entry["file"], str(chapter) if part.get("numbered") else ""))
            pages += [(s["file"], str(chapter) if part.get("numbered") else "") for s in entry.get("sections", [])]
    return pages


@dataclass
class Book:
    """The pages of a folder with their labels. `take` gives the next number of a kind while a page is flattened."""

    folder: Path
    substitutions: dict[str, str] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)
    citations: dict[str, Citation] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    numbers: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (page, kind) -> the numbers in order
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        listed = pages_of_toc(self.folder)
        names = {name for name, _ in listed}
        others = [(p.stem, "") for p in sorted(self.folder.glob("*.md")) if p.stem not in names]
        counters: Counter[tuple[str, str]] = Counter()
        for page, chapter in listed + others:
            self._scan(page, chapter, counters)
        if (self.folder / "references.bib").exists():
            entries = parse_file(str(self.folder / "references.bib")).entries
            self.citations = {key: citation(entry) for key, entry in entries.items()}

    # --- what the flattener asks ----------------------------------------------------------------------------------

    def find(self, label: str) -> Label:
        if label not in self.labels:
            close = get_close_matches(label, self.labels, n=1)
            raise MarkupError(f"no label '{label}' in the book." + (f" Did you mean '{close[0]}'?" if close else ""))
        return self.labels[label]

    def number(self, label: str) -> str:
        return self.find(label).number

    def title(self, page: str) -> str:
        if page.strip("/") not in self.titles:
            raise MarkupError(f"no page '{page}' in the book; pages: {', '.join(self.titles)}")
        return self.titles[page.strip("/")]

    def path(self, page: str, seen_from: str) -> str:
        """A link that works between the notebooks; a page that is no notebook is read in the repository."""
        page = page.strip("/")
        self.title(page)
        return f"{page}.ipynb" if is_chapter(self.folder / f"{page}.md") else f"../{page}.md"

    def take(self, page: str, kind: str) -> str:
        """The next number of this kind on this page: captions and theorems need no label to have one."""
        i = self.taken[page, kind]
        self.taken[page, kind] += 1
        return self.numbers[page, kind][i]

    def start(self, page: str) -> None:
        """Flattening a page begins (again)."""
        for key in [key for key in self.taken if key[0] == page]:
            del self.taken[key]

    # --- the scan ----------------------------------------------------------------------------------------------------

    def _scan(self, page: str, chapter: str, counters: Counter[tuple[str, str]]) -> None:
        def count(kind: str, label: str, title: str = "") -> None:
            counters[chapter, kind] += 1
            n = f"{chapter}.{counters[chapter, kind]}" if chapter else str(counters[chapter, kind])
            self.numbers.setdefault((page, kind), []).append(n)
            if label:
                self._add(label, Label(page, kind, n, title))

        def walk(text: str) -> None:
            for b in blocks(text):
                if b.name:
                    kind = b.name.removeprefix("prf:").removesuffix("-start")
                    if b.name == "math" and b.label:
                        count("equation", b.label)
                    elif b.name == "figure" and b.body.strip():
                        count("figure", b.label, b.body.strip())
                    elif b.name in ("table", "list-table") and b.argument:
                        count("table", b.label, b.argument)
                    elif (b.name.startswith("prf:") and kind in PROOFS) or kind == "exercise":
                        if "nonumber" not in b.options:
                            count(kind, b.label, b.argument)
                        elif b.label:
                            self._add(b.label, Label(page, kind, "", b.argument or kind.capitalize()))
                    elif b.label:
                        self._add(b.label, Label(page, kind, "", b.argument or kind.capitalize()))
                    if b.name not in ("code-block", "code", "math", "raw"):
                        walk(b.body)
                elif not b.verbatim:
                    for m in DOLLARS.finditer(b.body):
                        if m["label"]:
                            count("equation", m["label"])
                    self._sections(page, b.body)

        for cell in read_chapter(self.folder / f"{page}.md").cells:
            if cell.cell_type == "markdown":
                walk(cell.source)
            elif (figure := cell.metadata.get("mystnb", {}).get("figure", {})) and figure.get("caption"):
                count("figure", figure.get("name", ""), figure["caption"])
        self.titles.setdefault(page, page)

    def _sections(self, page: str, text: str) -> None:
        """Titles of pages and of labelled sections: a target line directly above a heading."""
        waiting: list[str] = []
        for line in text.split("\n"):
            if m := TARGET.match(line):
                waiting.append(m["label"])
            elif line.startswith("#"):
                title = line.lstrip("#").strip()
                self.titles.setdefault(page, title)
                for label in waiting:
                    self._add(label, Label(page, "section", "", title))
                waiting = []
            elif line.strip():
                for label in waiting:
                    self._add(label, Label(page, "section", "", label))
                waiting = []

    def _add(self, name: str, label: Label) -> None:
        if name in self.labels and self.labels[name].page != label.page:
            raise MarkupError(f"label '{name}' is in {self.labels[name].page} and in {label.page}")
        self.labels[name] = label


def read_chapter(path: Path) -> Any:
    """The cells of a page. Its front matter is for the book; the notebook gets its own metadata."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[-1]
    return jupytext.reads(text, fmt="md:myst")


def front_matter(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.startswith("---\n"):
        return {}
    return yaml.safe_load(text[4:].split("\n---\n", 1)[0]) or {}


def is_chapter(path: Path) -> bool:
    """A page that the book executes, and so one with a notebook: a MyST notebook with a kernel in its front matter."""
    front = front_matter(path)
    form = front.get("jupytext", {}).get("text_representation", {}).get("format_name")
    return "kernelspec" in front and (form == "myst" or front.get("file_format") == "mystnb")


def plain(text: str) -> str:
    """BibTeX to text: accents decoded braces dropped."""
    decoded: str = codecs.decode(text, "ulatex")  # type: ignore[call-overload]
    return decoded.replace("{", "").replace("}", "")


def citation(entry: Entry) -> Citation:
    people = entry.persons.get("author", [])
    last = [plain(" ".join(p.prelast_names + p.last_names)) for p in people]
    others = bool(last) and last[-1] == "others"
    if others or len(last) > 2:
        short = f"{last[0]} et al."
    else:
        short = " and ".join(last)
    full = [plain(" ".join(p.first_names + p.middle_names + p.prelast_names + p.last_names)) for p in people]
    names = ", ".join(full[:-1]) + " and others" if others else ", ".join(full)
    f = entry.fields
    url = f"https://doi.org/{f['doi']}" if "doi" in f else f.get("url", "")
    where = plain(f.get("journal") or f.get("booktitle") or f.get("howpublished") or "")
    title = plain(f["title"])
    return Citation(short, f["year"], url, f"{names}. *{title}*. {where}, {f['year']}." + (f" <{url}>" if url else ""))
