"""One sentence of the form "X beats Y", with all that decides whether it holds."""

from dataclasses import dataclass

from fedlora_mini.experiments.arms import title_of
from fedlora_mini.experiments.fewshot.arms import arm as fewshot_arm

MARGIN = 0.005  # half a Dice point: smaller differences count as none


@dataclass(frozen=True)
class Claim:
    """metric(a) - metric(b) is positive, negative or about zero (`sign` +1, -1, 0), paired over seeds and sites.

    An arm of another file is `ARM@FILE` (without .jsonl), and `ARM - ARM` is a difference, so that a - b can be an
    interaction; an empty b is zero. With `shots` the arms are few-shot ones (patterns, see `fewshot.report.of`),
    `ARM@TASK` is one task, seeds are splits, sites are tasks.
    """

    text: str
    a: str
    b: str
    results: str  # a file in results/
    sign: int
    protocol: str = "personal"
    metric: str = "dice"
    margin: float = MARGIN
    source: str = ""  # citation key; empty = ours
    matched: str = "rounds, local steps, batches, initial weights, data, adapter and rank"
    not_matched: str = "bytes sent"
    shots: int = 0
    seen: bool = False  # registered when its runs, or a part of them, had been seen
    again: bool = False  # registered before, and its runs made again since, by another protocol
    apart: bool = False  # the terms are of different data: each has its own score, and is averaged over its sites

    def title(self, name: str) -> str:
        """An arm's name for the reader."""
        if not self.shots:
            where = {file: file.partition("_")[2] for _, file in self.parts(self.a) + self.parts(self.b)}
            named = [f"{title_of(arm)}{f' ({where[file]})' * (len(where) > 1)}" for arm, file in self.parts(name)]
            return f"({' − '.join(named)})" if len(named) > 1 else named[0]
        arms, at, task = name.partition("@")
        text = ", ".join(fewshot_arm(arm).title for arm in arms.split("|"))
        return f"{text} on {task}" if at else text

    def parts(self, text: str) -> list[tuple[str, str]]:
        """The terms of `a` or `b`, of which the second and later are subtracted: (arm, file without .jsonl)."""
        own = self.results.removesuffix(".jsonl")
        found = [term.partition("@") for term in text.split(" - ") if term]
        return [(arm, file or own) for arm, _, file in found]

    @property
    def files(self) -> list[str]:
        """The files in results/ that the claim reads."""
        if self.shots:
            return [self.results]
        return list(dict.fromkeys(f"{file}.jsonl" for _, file in self.parts(self.a) + self.parts(self.b)))

    @property
    def part(self) -> str:
        """The part of the book that it belongs to: its family of tests."""
        if self.results.startswith("private_"):
            return "privacy"
        return "adapting a segmenter" if self.shots else "many sites"

    @property
    def measured(self) -> str:
        """What is compared, in words."""
        return f"{self.shots}-shot {self.metric}" if self.shots else f"{self.protocol} {self.metric}"
