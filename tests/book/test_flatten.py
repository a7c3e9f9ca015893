"""Each rule that turns MyST into plain Markdown, one example a rule."""

from pathlib import Path

import pytest
from flatten import Flattener, MarkupError, blocks
from labels import Book

ONE = """\
---
file_format: mystnb
kernelspec: {name: python3}
---
(ch-one)=
# One

(sec-a)=
## A section

$$
a = b
$$ (eq-one)

```{prf:theorem} Pythagoras
:label: thm-one
body
```

```{exercise}
:label: ex-one
body
```

```{figure} dot.svg
:name: fig-one
A dot.
```
"""

TWO = "# Two\n\n```{glossary}\nsite\n  A hospital.\n```\n"

BIB = """\
@article{dice1945, author={Dice, Lee R.}, title={A measure}, journal={Ecology}, year={1945}, doi={10.1/x}}
@misc{pair2000, author={Ag{\\"u}era, B. and Boyd, S.}, title={Pair}, year={2000}, url={https://example.org}}
@misc{many2001, author={Able, A. and Baker, B. and Cable, C.}, title={Many}, year={2001}}
"""


@pytest.fixture
def book(tmp_path: Path) -> Book:
    toc = "format: jb-book\nroot: two\nparts:\n- caption: I\n  numbered: true\n  chapters:\n  - file: one\n"
    for name, text in {
        "one.md": ONE,
        "two.md": TWO,
        "_toc.yml": toc,
        "references.bib": BIB,
        "dot.svg": "<svg/>",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return Book(tmp_path, {"install": "`pip install x`"})


def flat(book: Book, text: str, page: str = "one") -> str:
    return Flattener(book, page).cell(text)


ROLES = {
    "{cite}`dice1945`": "([Dice, 1945](https://doi.org/10.1/x))",
    "{cite:p}`dice1945,pair2000`": "([Dice, 1945](https://doi.org/10.1/x); [Agüera and Boyd, 2000](https://example.org))",
    "{cite:t}`many2001`": "Able et al. (2001)",
    "{eq}`eq-one`": "[(1.1)](#eq-one)",
    "{ref}`sec-a`": "[A section](#sec-a)",
    "{ref}`there <sec-a>`": "[there](#sec-a)",
    "{numref}`fig-one`": "[Fig. 1.1](#fig-one)",
    "{numref}`Picture %s <fig-one>`": "[Picture 1.1](#fig-one)",
    "{prf:ref}`thm-one`": "[Theorem 1.1](#thm-one)",
    "{ref}`ex-one`": "[Exercise 1.1](#ex-one)",
    "{doc}`two`": "[Two](../two.md)",
    "{doc}`here </one>`": "[here](one.ipynb)",
    "{term}`site`": "*site*",
    "{term}`sites <site>`": "*sites*",
    "{math}`x^2`": "$x^2$",
    "{download}`notebook <notebooks/one.ipynb>`": "[notebook](../notebooks/one.ipynb)",
    "{abbr}`SVD (singular value decomposition)`": "SVD (singular value decomposition)",
    "H{sub}`2`O": "H<sub>2</sub>O",
    "{kbd}`Ctrl`": "<kbd>Ctrl</kbd>",
    "{file}`a.py`": "`a.py`",
    "``{cite}`not a role` ``": "``{cite}`not a role` ``",
    "`plain` and $a`$": "`plain` and $a`$",
    "{{ install }}": "`pip install x`",
}


@pytest.mark.parametrize("source", ROLES)
def test_a_role_becomes_text_or_a_link(book: Book, source: str) -> None:
    assert flat(book, source) == ROLES[source]


DIRECTIVES = {
    "numbered dollars": ("$$\na = b\n$$ (eq-one)", '<a id="eq-one"></a>\n$$\na = b \\tag{1.1}\n$$'),
    "dollars on one line": ("$$a = b$$", "$$\na = b\n$$"),
    "several lines": ("$$\na &= b \\\\\nc &= d\n$$", "$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$"),
    "math": ("```{math}\n:label: eq-one\na\n```", '<a id="eq-one"></a>\n$$\na \\tag{1.1}\n$$'),
    "amsmath": ("\\begin{align}\na &= b\n\\end{align}", "\\begin{align}\na &= b\n\\end{align}"),
    "theorem": (
        "```{prf:theorem} Pythagoras\n:label: thm-one\nSee {eq}`eq-one`.\n```",
        '<a id="thm-one"></a>\n**Theorem 1.1 (Pythagoras).** See [(1.1)](#eq-one).',
    ),
    "theorem without a number": ("```{prf:lemma}\n:nonumber:\nText.\n```", "**Lemma.** Text."),
    "proof": ("```{prf:proof}\nClear.\n```", "*Proof.* Clear. $\\square$"),
    "note": ("```{note}\nTwo\n\nparagraphs.\n```", "> **Note.** Two\n>\n> paragraphs."),
    "note on one line": ("```{note} Short.\n```", "> **Note.** Short."),
    "colons": (":::{warning}\nHot.\n:::", "> **Warning.** Hot."),
    "own title": ("```{admonition} Run time\n:class: tip\n3 s\n```", "> **Run time.** 3 s"),
    "hidden admonition": (
        "```{admonition} Hint\n:class: dropdown\nLook.\n```",
        "<details>\n<summary>Hint</summary>\n\nLook.\n\n</details>",
    ),
    "dropdown": ("```{dropdown} More\nText\n```", "<details>\n<summary>More</summary>\n\nText\n\n</details>"),
    "nested": ("````{note}\n```{math}\nx\n```\n````", "> **Note.** $$\n> x\n> $$"),
    "exercise": ("```{exercise}\n:label: ex-one\nDo.\n```", '<a id="ex-one"></a>\n**Exercise 1.1.** Do.'),
    "gated exercise": (
        "```{exercise-start}\n:label: ex-one\n```\nDo.",
        '<a id="ex-one"></a>\n**Exercise 1.1.**\n\nDo.',
    ),
    "gate": ("Done.\n\n```{exercise-end}\n```", "Done."),
    "solution": (
        "```{solution} ex-one\n:class: dropdown\nSo.\n```",
        "<details>\n<summary>Solution to Exercise 1.1</summary>\n\nSo.\n\n</details>",
    ),
    "gated solution": ("```{solution-start} ex-one\n:class: dropdown\n```", "**Solution to Exercise 1.1.**"),
    "figure": (
        "```{figure} dot.svg\n:name: fig-one\n:alt: dot\nA dot.\n```",
        '![dot](data:image/svg+xml;base64,PHN2Zy8+)\n\n<a id="fig-one"></a>\n**Fig. 1.1.** A dot.',
    ),
    "image": ("```{image} dot.svg\n:alt: dot\n```", "![dot](data:image/svg+xml;base64,PHN2Zy8+)"),
    "list table": (
        "```{list-table}\n* - a\n  - b\n* - 1\n  - {math}`x`\n```",
        "| a | b |\n|---|---|\n| 1 | $x$ |",
    ),
    "code block": ("```{code-block} python\n:linenos:\nx = 1\n```", "```python\nx = 1\n```"),
    "plain code": ("```python\n{cite}`x`\n```", "```python\n{cite}`x`\n```"),
    "glossary": (
        "```{glossary}\nsite\n  A\n  hospital.\n\nclient\n  One.\n```",
        "- **site**: A hospital.\n- **client**: One.",
    ),
    "definitions": (
        "Offline\n: Copy the\n  folder.\n\nOnline\n: Look.",
        "- **Offline**: Copy the\n  folder.\n- **Online**: Look.",
    ),
    "tabs": ("````{tab-set}\n```{tab-item} CPU\nslow\n```\n````", "**CPU**\n\nslow"),
    "target": ("(sec-a)=\n## A section", '<a id="sec-a"></a>\n## A section'),
    "comment": ("% for authors\nText", "Text"),
    "bibliography": ("Text\n\n```{bibliography}\n```", "Text"),
    "in a list": ("- item\n\n  ```{note}\n  Inside.\n  ```", "- item\n\n  > **Note.** Inside."),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTIVES)
def test_a_directive_becomes_plain_markdown(book: Book, name: str) -> None:
    source, expected = DIRECTIVES[name]
    assert flat(book, source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("```{theorem}\nx\n```", "unknown directive 'theorem'"),
        ("```{notes}\nx\n```", "Did you mean 'note'"),
        ("{cites:p}`x`", "unknown citation 'x'"),
        ("{foo}`x`", "unknown role 'foo'"),
        ("{eq}`eq-on`", "Did you mean 'eq-one'"),
        ("{{ instal }}", "Did you mean 'install'"),
    ],
)
def test_unknown_markup_is_named_with_what_is_known(book: Book, source: str, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        flat(book, source)


def test_blocks_respect_fence_length_and_keep_the_rest() -> None:
    found = list(blocks("a\n````{x} t\n:k: v\n```{y}\nin\n```\n````\nb"))
    assert [(b.name, b.argument, b.options) for b in found] == [("", "", {}), ("x", "t", {"k": "v"}), ("", "", {})]
    assert found[1].body == "```{y}\nin\n```" and found[2].body == "b"
