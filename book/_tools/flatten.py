"""MyST to plain Markdown: what a directive or a role becomes in Colab, Jupyter and GitHub, which know only Markdown.

`Flattener(book, page).cell(text)` takes one Markdown cell of a chapter. Numbers are those of the rendered book:
`labels.py` counts what Sphinx counts. A directive without a rule here is an error: a notebook never shows markup.
"""

import base64
import mimetypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labels import Book

FENCE = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|~{3,}|:{3,})(?P<info>[^`]*)$")
DIRECTIVE = re.compile(r"^\{(?P<name>[\w:+.-]+)\}\s*(?P<argument>.*)$")
OPTION = re.compile(r"^:(?P<key>[\w-]+):\s*(?P<value>.*)$")
TARGET = re.compile(r"^\((?P<label>[^()\s]+)\)=\s*$")
DOLLARS = re.compile(r"^(?P<indent>[ \t]*)\$\$(?P<body>.*?)\$\$\s*(?:\((?P<label>[^()\s]+)\))?[ \t]*$", re.M | re.S)
# A code span, with the role before it if there is one: spans without a role are left alone.
ROLE = re.compile(
    r"(?:\{(?P<role>[\w:+-]+)\})?(?<!`)(?P<ticks>`+)(?!`)(?P<body>(?:(?!\n\n).)+?)(?<!`)(?P=ticks)(?!`)", re.S
)
TITLED = re.compile(r"^(?P<text>.*?)\s*<(?P<target>[^<>]+)>$", re.S)
SUBSTITUTION = re.compile(r"\{\{\s*(\w+)\s*\}\}")
DEFINITION = re.compile(r"^(?P<term>\S.*)\n\n?: +(?P<text>.*(?:\n(?: +\S.*))*)", re.M)

# fmt: off
ADMONITIONS = [
    "note", "tip", "hint", "important", "warning", "caution", "danger", "error", "attention", "seealso",
    "admonition", "margin", "sidebar", "epigraph",
]
PROOFS = [
    "theorem", "lemma", "proposition", "corollary", "definition", "remark", "example", "observation", "axiom",
    "assumption", "conjecture", "property", "criterion", "algorithm", "notation",
]
DROPPED = [
    "bibliography", "footbibliography", "nb-exec-table", "tableofcontents", "contents", "exercise-end",
    "solution-end", "index",
]
ROLES = [
    "cite", "cite:p", "cite:t", "eq", "ref", "numref", "prf:ref", "doc", "term", "math", "download", "abbr", "sub",
    "sup", "kbd", "code", "literal", "file", "command",
]
# fmt: on


class MarkupError(ValueError):
    """Markup in a chapter that the notebooks cannot show: the place, the name, what is accepted."""


@dataclass
class Block:
    """A directive, or a plain stretch of text when `name` is empty; `verbatim` text is a code fence."""

    name: str = ""
    argument: str = ""
    options: dict[str, str] = field(default_factory=dict)
    body: str = ""
    indent: str = ""
    verbatim: bool = False

    @property
    def label(self) -> str:
        return self.options.get("label") or self.options.get("name") or ""


def blocks(text: str) -> Iterator[Block]:
    """Cut Markdown into directives, code fences and the text between them. Directives are not entered."""
    lines, plain, i = text.split("\n"), [], 0
    while i < len(lines):
        opening = FENCE.match(lines[i])
        directive = DIRECTIVE.match(opening["info"].strip()) if opening else None
        if not opening or (opening["mark"][0] == ":" and not directive):
            plain.append(lines[i])
            i += 1
            continue
        closing = re.compile(rf"^\s*{re.escape(opening['mark'][0])}{{{len(opening['mark'])},}}\s*$")
        end = next((j for j in range(i + 1, len(lines)) if closing.match(lines[j])), len(lines))
        if plain:
            yield Block(body="\n".join(plain))
            plain = []
        inside = [line.removeprefix(opening["indent"]) for line in lines[i + 1 : end]]
        if directive:
            options, body = split_options(inside)
            yield Block(directive["name"], directive["argument"].strip(), options, body, opening["indent"])
        else:
            yield Block(body="\n".join(lines[i : end + 1]), verbatim=True)
        i = end + 1
    if plain:
        yield Block(body="\n".join(plain))


def split_options(lines: list[str]) -> tuple[dict[str, str], str]:
    """The options of a directive, `:key: value` or a block between `---`, and its body."""
    options: dict[str, str] = {}
    i = 0
    if lines and lines[0].strip() == "---":
        i = next((j for j in range(1, len(lines)) if lines[j].strip() == "---"), len(lines) - 1) + 1
        for line in lines[1 : i - 1]:
            key, _, value = line.partition(":")
            options[key.strip()] = value.strip()
    else:
        while i < len(lines) and (m := OPTION.match(lines[i].strip())):
            options[m["key"]] = m["value"].strip()
            i += 1
    return options, "\n".join(lines[i:]).strip("\n")


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().split("\n"))


def details(summary: str, text: str) -> str:
    """A part that opens on a click. The blank lines let Markdown inside it be read as Markdown."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def anchor(label: str) -> str:
    return f'<a id="{label}"></a>\n' if label else ""


def display(body: str, number: str = "", label: str = "") -> str:
    """A displayed equation, with the book's number. Several lines need an environment outside Sphinx."""
    body = body.strip()
    if "\\\\" in body and not body.startswith("\\begin"):
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    tag = f" \\tag{{{number}}}" if number else ""
    return f"{anchor(label)}$$\n{body}{tag}\n$$"


@dataclass
class Flattener:
    """Turns the Markdown cells of one page into plain Markdown. `cited` collects the keys in order of citation."""

    book: "Book"
    page: str
    cited: list[str] = field(default_factory=list)

    def cell(self, text: str) -> str:
        text = self.flatten(text)
        return re.sub(r"\n{3,}", "\n\n", text).strip()

    def flatten(self, text: str) -> str:
        parts = []
        for block in blocks(text):
            if block.verbatim:
                parts.append(block.body)
            elif block.name:
                out = self.directive(block)
                parts.append("\n".join(block.indent + line if line else line for line in out.split("\n")))
            else:
                parts.append(self.text(block.body))
        return "\n".join(parts)

    # --- text ---------------------------------------------------------------------------------------------------

    def text(self, text: str) -> str:
        """Everything outside directives: comments, targets, numbered equations, definition lists, roles."""
        lines = [line for line in text.split("\n") if not line.startswith("% ")]
        text = "\n".join(anchor(m["label"]).rstrip() if (m := TARGET.match(line)) else line for line in lines)
        text = DEFINITION.sub(lambda m: f"- **{m['term']}**: " + re.sub(r"\n\s+", "\n  ", m["text"]), text)
        text = re.sub(r"(?m)^(- \*\*.*(?:\n  .*)*)\n\n(?=- \*\*)", r"\1\n", text)
        text = DOLLARS.sub(self._dollars, text)
        text = SUBSTITUTION.sub(self._substitution, text)
        return ROLE.sub(self._role, text)

    def _dollars(self, m: re.Match[str]) -> str:
        label = m["label"] or ""
        out = display(m["body"], self.book.number(label) if label else "", label)
        return "\n".join(m["indent"] + line for line in out.split("\n"))

    def _substitution(self, m: re.Match[str]) -> str:
        if m[1] not in self.book.substitutions:
            raise self.error("substitution", m[1], self.book.substitutions)
        return self.book.substitutions[m[1]]

    def error(self, kind: str, name: str, accepted: object) -> MarkupError:
        names = sorted(map(str, accepted))  # type: ignore[call-overload]
        close = get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return MarkupError(f"{self.page}: unknown {kind} '{name}'; the notebooks know {', '.join(names)}.{hint}")

    # --- roles --------------------------------------------------------------------------------------------------

    def _role(self, m: re.Match[str]) -> str:
        name, body = m["role"], re.sub(r"\s*\n\s*", " ", m["body"])
        if name is None:
            return m[0]
        titled = TITLED.match(body)
        text, target = (titled["text"], titled["target"]) if titled else ("", body)
        if name.startswith("cite"):
            return self._cite(name, [key.strip() for key in body.split(",")])
        if name == "eq":
            return f"[({self.book.number(target)})]({self._link(target)})"
        if name in ("ref", "numref", "prf:ref"):
            found = self.book.find(target)
            shown = found.title if name == "ref" and not found.number else found.shown
            if "%s" in text or "{number}" in text:
                shown = text.replace("%s", found.number).replace("{number}", found.number)
            elif text:
                shown = text
            return f"[{shown}]({self._link(target)})"
        if name == "doc":
            return f"[{text or self.book.title(target)}]({self.book.path(target, self.page)})"
        if name == "term":
            return f"*{text or target}*"
        if name == "math":
            return f"${m['body']}$"
        if name == "download":
            return f"[{text or target}](../{target.removeprefix('./')})"
        if name == "abbr":
            short, _, long = body.partition(" (")
            return f"{short} ({long}" if long else body
        if name in ("sub", "sup", "kbd"):
            return f"<{name}>{body}</{name}>"
        if name in ("code", "literal", "file", "command"):
            return f"`{m['body']}`"
        raise self.error("role", name, ROLES)

    def _link(self, label: str) -> str:
        page = self.book.find(label).page
        return f"#{label}" if page == self.page else f"{self.book.path(page, self.page)}#{label}"

    def _cite(self, role: str, keys: list[str]) -> str:
        self.cited += [key for key in keys if key not in self.cited]
        shown = []
        for key in keys:
            if key not in self.book.citations:
                raise self.error("citation", key, self.book.citations)
            c = self.book.citations[key]
            name = f"{c.authors} ({c.year})" if role.startswith("cite:t") else f"{c.authors}, {c.year}"
            shown.append(f"[{name}]({c.url})" if c.url else name)
        return ", ".join(shown) if role.startswith("cite:t") else f"({'; '.join(shown)})"

    # --- directives ---------------------------------------------------------------------------------------------

    def directive(self, b: Block) -> str:
        rule = self.rules().get(b.name)
        if rule is None:
            raise self.error("directive", b.name, self.rules())
        return "\n" + rule(b).strip("\n ") + "\n"

    def rules(self) -> dict[str, Callable[[Block], str]]:
        """Name of a directive -> what it becomes. The list of what a chapter may use."""
        return (
            dict.fromkeys(ADMONITIONS, self._admonition)
            | dict.fromkeys((f"prf:{name}" for name in PROOFS), self._theorem)
            | dict.fromkeys(DROPPED, lambda b: "")
            | {
                "math": lambda b: display(
                    "\n".join(filter(None, (b.argument, b.body))), self.book.number(b.label) if b.label else "", b.label
                ),
                "prf:proof": lambda b: "*Proof.* " + self._inside(b) + " $\\square$",
                "exercise": self._exercise,
                "exercise-start": self._exercise,
                "solution": self._solution,
                "solution-start": self._solution,
                "dropdown": lambda b: details(self.text(b.argument) or "Details", self._inside(b, argument=False)),
                "figure": self._figure,
                "image": self._figure,
                "table": lambda b: self._caption(b, b.argument) + "\n\n" + self._inside(b, argument=False),
                "list-table": self._list_table,
                "code-block": lambda b: f"```{b.argument}\n{b.body}\n```",
                "code": lambda b: f"```{b.argument}\n{b.body}\n```",
                "glossary": self._glossary,
                "tab-set": lambda b: self._inside(b),
                "tab-item": lambda b: f"**{self.text(b.argument)}**\n\n" + self._inside(b, argument=False),
                "div": lambda b: self._inside(b, argument=False),
                "raw": lambda b: b.body if b.argument == "html" else "",
            }
        )

    def _inside(self, b: Block, argument: bool = True) -> str:
        """The flattened body. Text on the opening line of a directive without a title belongs to its body."""
        text = f"{b.argument}\n{b.body}" if argument and b.argument else b.body
        return self.flatten(text).strip()

    def _admonition(self, b: Block) -> str:
        if "dropdown" in b.options.get("class", ""):
            return details(self.text(b.argument) or b.name.capitalize(), self._inside(b, argument=False))
        if b.name in ("admonition", "sidebar"):
            return quote(f"**{self.text(b.argument)}.** " + self._inside(b, argument=False))
        if b.name in ("margin", "epigraph"):
            return quote(self._inside(b))
        title = {"seealso": "See also"}.get(b.name, b.name.capitalize())
        return quote(f"**{title}.** " + self._inside(b))

    def _lead(self, b: Block, kind: str) -> str:
        """ "**Theorem 3.1 (Title).** ", with an anchor before it."""
        number = "" if "nonumber" in b.options else f" {self.book.take(self.page, kind.lower())}"
        title = f" ({self.text(b.argument)})" if b.argument else ""
        return f"{anchor(b.label)}**{kind}{number}{title}.** "

    def _theorem(self, b: Block) -> str:
        return self._lead(b, b.name.removeprefix("prf:").capitalize()) + self._inside(b, argument=False)

    def _exercise(self, b: Block) -> str:
        return self._lead(b, "Exercise") + self._inside(b, argument=False)

    def _solution(self, b: Block) -> str:
        """A solution is folded away. A gated one goes on in the code cells after it, which fold their source."""
        title = f"Solution to {self.book.find(b.argument).shown}"
        if b.name == "solution-start":
            return f"{anchor(b.label)}**{title}.** " + self._inside(b, argument=False)
        return anchor(b.label) + details(title, self._inside(b, argument=False))

    def _caption(self, b: Block, text: str, kind: str = "table") -> str:
        shown = {"figure": "Fig.", "table": "Table"}[kind]
        if not text.strip():
            return anchor(b.label).strip()
        return f"{anchor(b.label)}**{shown} {self.book.take(self.page, kind)}.** {self.text(text).strip()}"

    def _figure(self, b: Block) -> str:
        """The picture travels inside the notebook: neither Colab nor a downloaded copy could follow a relative path."""
        source = self.book.folder / b.argument
        kind = mimetypes.guess_type(source.name)[0] or "image/png"
        if not source.is_file():
            raise MarkupError(f"{self.page}: no picture '{b.argument}' beside the chapter")
        data = base64.b64encode(source.read_bytes()).decode()
        picture = f"![{b.options.get('alt', '')}](data:{kind};base64,{data})"
        caption = self._caption(b, b.body, "figure") if b.name == "figure" else anchor(b.label).strip()
        return f"{picture}\n\n{caption}".strip()

    def _list_table(self, b: Block) -> str:
        rows = [
            [self.text(" ".join(cell.split())) for cell in re.split(r"\n\s*-(?: |$)", "\n" + row)[1:]]
            for row in re.split(r"(?m)^\s*\* (?=-)", b.body)
            if row.strip()
        ]
        head = "| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|"
        body = "\n".join("| " + " | ".join(row) + " |" for row in rows[1:])
        return f"{self._caption(b, b.argument)}\n\n{head}\n{body}"

    def _glossary(self, b: Block) -> str:
        entries = re.split(r"\n\s*\n", b.body.strip())
        pairs = (entry.split("\n", 1) for entry in entries)
        return "\n".join(f"- **{term.strip()}**: {self.text(' '.join(rest.split()))}" for term, rest in pairs)
