"""Every sentence of the form "X beats Y" that the book makes, and the verdict that stored runs give it.

A claim is written down before it is run: its arms, data, protocol, metric, sign and margin. Nothing here is a result.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.experiments.fewshot import report as fewshot
from fedlora_mini.experiments.fewshot.arms import arm as fewshot_arm
from fedlora_mini.experiments.report import read_results, table_of
from fedlora_mini.experiments.stats import Difference, holm, paired_difference
from fedlora_mini.federation import METHODS

MARGIN = 0.005  # half a Dice point: smaller differences count as none
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """metric(a) - metric(b) is positive, negative or about zero (`sign` +1, -1, 0), paired over seeds and sites.

    With `shots` the arms are few-shot ones (patterns, see `fewshot.report.of`), seeds are splits, sites are tasks.
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

    def title(self, name: str) -> str:
        """An arm's name for the reader."""
        arms, at, task = name.partition("@")
        if not self.shots:
            return METHODS[name].title
        text = ", ".join(fewshot_arm(arm).title for arm in arms.split("|"))
        return f"{text} on {task}" if at else text

    @property
    def measured(self) -> str:
        """What is compared, in words."""
        return f"{self.shots}-shot {self.metric}" if self.shots else f"{self.protocol} {self.metric}"


def _fewshot(
    text: str,
    a: str,
    b: str,
    sign: int,
    *,
    shots: int = 5,
    results: str = "fewshot_phantom.jsonl",
    metric: str = "dice",
    margin: float = MARGIN,
    source: str = "baklouti2025arena",
    matched: str = "steps, stopping rule, batches, labelled and test images; each rate from one grid on another task",
    not_matched: str = "λ and ρ of ARENA, chosen on that other task",
) -> Claim:
    return Claim(text, a, b, results, sign, "", metric, margin, source, matched, not_matched, shots)


CLAIMS: dict[str, Claim] = {
    "fedit-below-local": Claim(
        "When sites differ in appearance, one shared LoRA (FedIT) is worse for a site's own data than training alone.",
        "fedit",
        "local",
        "phantom_appearance.jsonl",
        -1,
    ),
    "fedit-below-local-supervision": Claim(
        "When sites differ in how they annotate, FedIT is worse for a site's own data than training alone.",
        "fedit",
        "local",
        "phantom_supervision.jsonl",
        -1,
    ),
    "fedit-below-local-nuclei": Claim(
        "On four real nuclei domains, FedIT is worse for a domain's own data than training alone.",
        "fedit",
        "local",
        "nuclei_domains.jsonl",
        -1,
    ),
    "fedit-new-site": Claim(
        "For a site that never trained, FedIT's shared model is better than the mean of locally trained ones.",
        "fedit",
        "local",
        "phantom_appearance.jsonl",
        +1,
        protocol="new site",
    ),
    "exactness-helps": Claim(
        "An exact average helps: RoLoRA, whose aggregation error is zero, beats FedIT at equal rounds and steps.",
        "rolora",
        "fedit",
        "phantom_appearance.jsonl",
        +1,
        source="chen2024rolora",
        not_matched="bytes sent (RoLoRA sends one factor a round), updates per factor (half)",
    ),
    "fedsa-over-fedit": Claim(
        "Sharing A alone (FedSA) beats sharing both factors on each site's own data.",
        "fedsa",
        "fedit",
        "phantom_appearance.jsonl",
        +1,
        source="guo2025fedsa",
        not_matched="bytes sent, and the head, which FedSA keeps at the site",
    ),
    "iat-over-fedsa-nuclei": Claim(
        "On real nuclei domains, IAT's sharing beats FedSA on each domain's own data.",
        "iat",
        "fedsa",
        "nuclei_domains.jsonl",
        +1,
        source="zhao2026iat",
        not_matched="bytes sent, and the head: IAT shares it, FedSA does not",
    ),
    "lora-equals-full": Claim(
        "FedAvg of all weights and FedIT, which trains a tenth of them, score the same on a site's own data.",
        "fedavg",
        "fedit",
        "phantom_appearance.jsonl",
        0,
        matched="rounds, local steps, batches, initial weights, data",
        not_matched="trained parameters and bytes (ten times as many for FedAvg); each with its own learning rate",
    ),
    "arena-over-lora-5": _fewshot(
        "From five images, ARENA segments a thin new organ better than LoRA of the same initial rank.",
        "arena-8",
        "lora-8",
        +1,
    ),
    "arena-over-lora-10": _fewshot(
        "From ten images, ARENA segments a thin new organ better than LoRA of the same initial rank.",
        "arena-8",
        "lora-8",
        +1,
        shots=10,
    ),
    "arena-flat-in-rank": _fewshot(
        "ARENA's Dice depends less on its initial rank than LoRA's on its rank: smaller range over 4, 8, 16, 32.",
        "arena-4|arena-8|arena-16|arena-32",
        "lora-4|lora-8|lora-16|lora-32",
        -1,
        metric="range of dice",
    ),
    "arena-rank-falls": _fewshot(
        "A larger weight λ of the l1 norm leaves a smaller rank.",
        "arena-16-lam0.03",
        "arena-16-lam0.003",
        -1,
        metric="rank",
        margin=1.0,
        matched="start, initial rank, learning rate, ρ, steps, batches, labelled and test images",
        not_matched="nothing",
    ),
    "arena-vacuous-l1": _fewshot(
        "Without a fixed gauge or decay the l1 penalty shrinks v more than it shrinks ΔW: ||v||_1 / ||ΔW||_* falls.",
        "free-lam",
        "free-lam0",
        -1,
        metric="log l1_v / nuclear",
        margin=0.01,
        source="",
        matched="start, rank, learning rate, ρ, steps, batches, labelled and test images",
        not_matched="nothing",
    ),
    "arena-vacuous-l1-same-update": _fewshot(
        "It does so at an unchanged update: the nuclear norm of ΔW stays.",
        "free-lam",
        "free-lam0",
        0,
        metric="log nuclear",
        margin=0.05,
        source="",
        matched="start, rank, learning rate, ρ, steps, batches, labelled and test images",
        not_matched="nothing",
    ),
    "arena-needs-sparsity": _fewshot(
        "What ARENA gains is due to its l1 norm: with λ = 0, all else equal, it scores lower.",
        "arena-16",
        "arena-16-lam0",
        +1,
        source="",
        matched="start, initial rank, ρ, steps, batches, labelled and test images",
        not_matched="rates: searched for the arm with the norm, the same for the one without",
    ),
    "arena-rank-count-grown": _fewshot(
        "Growing λ in the unit gauge makes the rank that is left depend less on the initial one than a fixed λ does.",
        "grown-4|grown-8|grown-16|grown-32",
        "arena-4|arena-8|arena-16|arena-32",
        -1,
        metric="range of rank",
        margin=1.0,
        source="",
        matched="start, initial ranks, ρ, steps, batches, labelled and test images",
        not_matched="λ and its course, gauge; rates: searched for the fixed λ, one for the growing one",
    ),
    "arena-rank-by-task": _fewshot(
        "ARENA's rank depends on the task: stained tissue in colour keeps more directions than fluorescence.",
        "arena-16@nuclei-he",
        "arena-16@nuclei-fluo256",
        +1,
        metric="rank",
        margin=1.0,
        results="fewshot_nuclei.jsonl",
        matched="start, initial rank, learning rate, λ, ρ, steps, batch size",
        not_matched="the images",
    ),
    **{
        f"arena-over-lora-{name}": _fewshot(
            f"From five images, ARENA segments {what} better than LoRA of the same initial rank.",
            "arena-8",
            "lora-8",
            +1,
            results=f"fewshot_{name}.jsonl",
        )
        for name, what in (("nuclei", "nuclei of a new domain"), ("hippocampus", "the parts of the hippocampus"))
    },
    **{
        f"full-overfits-{name}": _fewshot(
            f"From five images full fine-tuning overfits: it is worse than LoRA on {what}.",
            "full",
            "lora-8",
            -1,
            source="",
            results=f"fewshot_{name}.jsonl",
            not_matched="trained parameters",
        )
        for name, what in (("nuclei", "nuclei of a new domain"), ("hippocampus", "the parts of the hippocampus"))
    },
    "full-overfits": _fewshot(
        "From five images full fine-tuning overfits: it is worse than LoRA.",
        "full",
        "lora-8",
        -1,
        source="",
        not_matched="trained parameters (ten times as many)",
    ),
    "arena-over-sora": _fewshot(
        "Proximal steps on v (ARENA) score higher than SoRA's thresholded Adam steps.",
        "arena-8",
        "sora",
        +1,
        not_matched="λ and ρ: ARENA's were chosen on the tuning task, SoRA's are those of its code",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about one claim."""

    claim: Claim
    difference: Difference | None
    p: float | None  # Holm-corrected over all claims that have results
    word: str  # supported, contradicted, not supported, inconclusive, not run

    def _repr_markdown_(self) -> str:
        claim, d = self.claim, self.difference
        a, b = claim.title(claim.a), claim.title(claim.b)
        expected = {1: "positive", -1: "negative", 0: f"within ±{claim.margin:g}"}[claim.sign]
        lines = [
            f"**Claim.** {claim.text}",
            "",
            "| | |",
            "|---|---|",
            f"| verdict | **{self.word}** |",
            f"| expected | {a} − {b}, {claim.measured}: {expected} |",
        ]
        if d is not None:
            p = f", p = {self.p:.3f} (Holm)" if self.p is not None else ""
            lines.append(f"| measured | {d.mean:+.4f}, 95 % interval [{d.low:+.4f}, {d.high:+.4f}]{p} |")
            what, where = ("splits", "task") if claim.shots else ("seeds", "site")
            lines.append(f"| paired over | {d.seeds} {what} × {d.sites} {where}{'s' if d.sites > 1 else ''} |")
        lines += [
            f"| matched | {claim.matched} |",
            f"| not matched | {claim.not_matched} |",
            f"| runs | `results/{claim.results}` |",
        ]
        return "\n".join(lines)


def results_folder() -> Path | None:
    """The repository's `results/`: $FEDLORA_RESULTS, or above the working folder, or beside the package's sources."""
    named = os.environ.get("FEDLORA_RESULTS")
    places = [Path(named)] if named else [p / "results" for p in (Path.cwd(), *Path.cwd().parents)]
    places.append(Path(__file__).parents[2] / "results")
    return next((p for p in places if p.is_dir()), None)


def _difference(claim: Claim) -> Difference | None:
    folder = results_folder()
    if folder is None or not (folder / claim.results).is_file():
        return None
    results = read_results([folder / claim.results])
    if claim.shots:
        a, b = (fewshot.table_of(results, arm, claim.shots, claim.metric) for arm in (claim.a, claim.b))
    else:
        a, b = (table_of(results, arm, claim.protocol, claim.metric) for arm in (claim.a, claim.b))
    if not a.size or a.shape != b.shape:
        raise FedloraError(f"'{claim.results}' does not hold both {claim.a} and {claim.b} with the same seeds")
    return paired_difference(a, b)


def judge(claim: Claim, d: Difference, p: float) -> str:
    """No effect if the interval fits within the margin; else an effect if its corrected p is below 0.05."""
    none = -claim.margin < d.low and d.high < claim.margin
    if none:
        return "supported" if claim.sign == 0 else "not supported"
    if p >= LEVEL:
        return "inconclusive"
    return "supported" if d.mean * claim.sign > 0 else "contradicted"


def verdicts(claims: dict[str, Claim] | None = None) -> dict[str, Verdict]:
    """All verdicts, p-values corrected together."""
    table = CLAIMS if claims is None else claims
    found = {key: _difference(claim) for key, claim in table.items()}
    tested = {key: d for key, d in found.items() if d is not None}
    corrected = dict(zip(tested, holm([d.p_bootstrap for d in tested.values()]), strict=True))
    return {
        key: Verdict(claim, d, corrected[key], judge(claim, d, corrected[key]))
        if (d := found[key]) is not None
        else Verdict(claim, None, None, "not run")
        for key, claim in table.items()
    }


def verdict(key: str) -> Verdict:
    """The card of one claim; a notebook shows it as a table."""
    if key not in CLAIMS:
        raise unknown("claim", key, CLAIMS)
    return verdicts()[key]
