"""Every sentence of the form "X beats Y" that the book makes, and the verdict that stored runs give it.

A claim is written down before it is run: its arms, data, protocol, metric, sign and margin. Nothing here is a result.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.experiments.claim import MARGIN, Claim
from fedlora_mini.experiments.claims_privacy import PRIVACY
from fedlora_mini.experiments.fewshot import report as fewshot
from fedlora_mini.experiments.report import arms, read_results, table_of
from fedlora_mini.experiments.stats import Difference, holm, paired_difference

LEVEL = 0.05


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


def _cell(
    text: str,
    a: str,
    b: str,
    cell: str,
    *,
    sign: int = +1,
    source: str = "zhao2026iat",
    protocol: str = "personal",
    not_matched: str = "how the bytes divide between encoder and decoder",
) -> Claim:
    """A claim on one cell of the 2x2 of simulated shifts."""
    return Claim(text, a, b, f"factorial_{cell}.jsonl", sign, protocol, source=source, not_matched=not_matched)


def _sor(text: str, metric: str, sign: int = -1, protocol: str = "leakage", margin: float = 0.01) -> Claim:
    a, b, matched = "iat_sor:form=exact,lam=0.01", "iat", "rounds, steps, batches, initial weights, data, rank, bytes"
    return Claim(text, a, b, "sor_both.jsonl", sign, protocol, metric, margin, "zhao2026iat", matched, "nothing")


def _hospitals(name: str, what: str) -> dict[str, Claim]:
    """The claims on one set of real sites. `near-…`: the signs that `results/nearness.jsonl` predicts for it."""

    def claim(
        text: str, a: str, b: str, sign: int = +1, source: str = "zhao2026iat", not_matched: str = "bytes sent"
    ) -> Claim:
        results = f"hospitals_{name}.jsonl"
        return Claim(f"On {what}, {text}", a, b, results, sign, source=source, not_matched=not_matched)

    own, sor = "on each one's own data", "iat_sor:form=exact,lam=0.01"
    told = "as the sites' own updates predict"
    return {
        f"iat-over-fedsa-{name}": claim(f"IAT's assignment beats FedSA's {own}.", "iat_own_head", "fedsa"),
        f"iat-over-fedit-{name}": claim(f"IAT beats one LoRA for all (FedIT) {own}.", "iat", "fedit"),
        f"iat-over-local-{name}": claim(f"IAT's sharing beats training alone {own}.", "iat", "local"),
        f"sor-improves-{name}": claim(f"SOR improves IAT's Dice {own}.", sor, "iat", not_matched="nothing"),
        f"near-one-factor-{name}": claim(
            f"one A everywhere is better than one B everywhere, {told}.", "inverse_fedsa", "fedsa", -1, source=""
        ),
        f"near-two-factors-{name}": claim(
            f"the assignment opposite to IAT's is better, {told}.", "iat_own_head", "anti_own_head", -1, source=""
        ),
    }


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
    "iat-sharing-over-fedsa-nuclei": Claim(
        "On real nuclei domains, IAT's sharing beats FedSA on each domain's own data.",
        "iat",
        "fedsa",
        "nuclei_domains.jsonl",
        +1,
        source="zhao2026iat",
        not_matched="bytes sent, and the head: IAT shares it, FedSA does not",
    ),
    # I1: the preference flips with the kind of shift. The four assignments keep the head at the site.
    "share-b-under-appearance": _cell(
        "Where sites differ in appearance alone, sharing B (A stays) beats sharing A (B stays) in both regions.",
        "inverse_fedsa",
        "fedsa",
        "appearance",
    ),
    "share-a-under-supervision": _cell(
        "Where sites differ in annotation alone, sharing A (B stays) beats sharing B (A stays) in both regions.",
        "fedsa",
        "inverse_fedsa",
        "supervision",
    ),
    "preference-flips": _cell(
        "What sharing B instead of A gains is larger under a shift of appearance than under one of annotation.",
        "inverse_fedsa - fedsa",
        "inverse_fedsa@factorial_supervision - fedsa@factorial_supervision",
        "appearance",
    ),
    # I2: with both shifts, B shared in the encoder and A in the decoder is the best of four and the opposite the worst
    "iat-over-anti": _cell(
        "Under both shifts IAT's assignment beats the opposite one.", "iat_own_head", "anti_own_head", "both"
    ),
    "iat-over-fedsa": _cell(
        "Under both shifts IAT's assignment beats sharing A everywhere (FedSA).", "iat_own_head", "fedsa", "both"
    ),
    "iat-over-inverse": _cell(
        "Under both shifts IAT's assignment beats sharing B everywhere.", "iat_own_head", "inverse_fedsa", "both"
    ),
    "anti-worst": _cell(
        "Under both shifts the opposite assignment is the worst of the four: below sharing A everywhere.",
        "anti_own_head",
        "fedsa",
        "both",
        sign=-1,
    ),
    "iat-over-fedit-both": _cell(
        "Under both shifts IAT beats one LoRA for all (FedIT).",
        "iat",
        "fedit",
        "both",
        not_matched="bytes sent (FedIT twice as many)",
    ),
    "iat-over-local-both": _cell(
        "Under both shifts IAT beats training alone at the same rank.",
        "iat",
        "local",
        "both",
        not_matched="bytes sent (none by a site alone)",
    ),
    "dual-over-fedit-new-site": _cell(
        "A shared and a private branch serve a new site better than one shared LoRA.",
        "dual",
        "fedit",
        "both",
        source="",
        protocol="new site",
        not_matched="trained parameters (two branches of rank 4 against one)",
    ),
    # I3: what the orthogonality regulariser does, at one weight of its exact form
    "sor-lowers-m2": _sor("SOR lowers the squared cosine of shared and private change (its own target).", "leak_cos2"),
    "sor-lowers-m3": _sor(
        "SOR lowers the share of the common change that lies in the span of the sites' own ones.", "leak_explained"
    ),
    "sor-lowers-probe": _sor("SOR makes sites harder to tell from their updates of the shared factor.", "site_probe"),
    "sor-lowers-swap-drop": _sor(
        "With SOR a site loses less with another site's private factors.", "swap_drop", margin=MARGIN
    ),
    "sor-improves-dice": _sor("SOR improves Dice on each site's own data.", "dice", +1, "personal", MARGIN),
    "sor-improves-new-site": _sor("SOR improves Dice at sites that never trained.", "dice", +1, "new site", MARGIN),
    # I4
    "no-free-lunch": _cell(
        "Where sites do not differ, private factors cost nothing: IAT and FedIT score the same.",
        "iat",
        "fedit",
        "none",
        sign=0,
        not_matched="bytes sent (FedIT twice as many)",
    ),
    # P1
    "resfim-over-lottery": Claim(
        "pFL-ResFIM's mask beats a random one of the same share.",
        "resfim",
        "resfim:score=lottery",
        "resfim_appearance.jsonl",
        +1,
        source="zhu2026resfim",
        matched="rounds, local steps, batches, initial weights, data, share of private entries",
        not_matched="the mean amplitudes that ResFIM also sends",
    ),
    "resfim-over-information": Claim(
        "The residual of the Fisher information is a better mask than the information itself.",
        "resfim",
        "resfim:score=information",
        "resfim_appearance.jsonl",
        +1,
        source="zhu2026resfim",
        matched="rounds, local steps, batches, initial weights, data, share of private entries",
        not_matched="the mean amplitudes that ResFIM also sends",
    ),
    "resfim-once-over-lottery": Claim(
        "So does the residual's first mask, kept for good as the random one is.",
        "resfim:once=true",
        "resfim:score=lottery",
        "resfim_appearance.jsonl",
        +1,
        source="",
        matched="rounds, local steps, batches, initial weights, data, share of private entries, how long a mask lasts",
        not_matched="the mean amplitudes that ResFIM also sends",
    ),
    "resfim-early": Claim(
        "Under a shift of appearance the residual, relative to the information, is larger in the encoder.",
        "resfim",
        "",
        "resfim_appearance.jsonl",
        +1,
        protocol="work",
        metric="early",
        margin=0.1,
        source="zhu2026resfim",
        matched="everything: one model, two regions",
        not_matched="nothing",
    ),
    "resfim-early-beyond-floor": Claim(
        "It is so by more than under the transfer to a site's own mean amplitude, which tells of no other site.",
        "resfim",
        "",
        "resfim_appearance.jsonl",
        +1,
        protocol="work",
        metric="beyond_floor",
        margin=0.1,
        source="",
        matched="everything: one model, two regions",
        not_matched="nothing",
    ),
    # real sites
    **_hospitals("polypgen", "five hospitals' polyps"),
    **_hospitals("lgg", "gliomas of four institutions"),
    "iat-over-local-nuclei": Claim(
        "On four real nuclei domains, IAT's sharing beats training alone on each domain's own data.",
        "iat",
        "local",
        "nuclei_domains.jsonl",
        +1,
        source="zhao2026iat",
        not_matched="bytes sent (none by a site alone)",
    ),
    "ditto-over-alone": Claim(
        "Pulled towards FedAvg's model, a site's own model is better at its site than trained alone (Ditto).",
        "ditto",
        "ditto:lam=0",
        "personal_both.jsonl",
        +1,
        source="li2021ditto",
        not_matched="nothing",
    ),
    "dual-over-local": Claim(
        "A branch of one's own beside a shared one is better at the site than training alone.",
        "dual",
        "local",
        "factorial_both.jsonl",
        +1,
        matched="rounds, local steps, batches, initial weights, data",
        not_matched="trained numbers (twice as many), bytes",
    ),
    "fedrep-over-fedavg": Claim(
        "Keeping the head at the site (FedRep) is better for the site than one model for all (FedAvg).",
        "fedrep",
        "fedavg",
        "personal_both.jsonl",
        +1,
        source="collins2021fedrep",
        not_matched="which tensors move at a step",
    ),
    "fedbn-over-fedavg": Claim(
        "Keeping the norms at the site (FedBN) is better for the site than one model for all (FedAvg).",
        "fedbn",
        "fedavg@personal_both",
        "personal_more.jsonl",
        +1,
        source="li2021fedbn",
    ),
    "fedproto-over-alone": Claim(
        "Pulled towards common class prototypes (FedProto), a site's own model is better at its site than alone.",
        "fedproto",
        "ditto:lam=0@personal_both",
        "personal_more.jsonl",
        +1,
        source="tan2022fedproto",
        matched="rounds, local steps, initial weights, data, what is trained",
        not_matched="batches (drawn apart), bytes",
    ),
    "moon-over-fedavg": Claim(
        "Features near the common model's and far from one's last (MOON) make a better common model than FedAvg.",
        "moon",
        "fedavg@personal_both",
        "personal_more.jsonl",
        +1,
        "global",
        source="li2021moon",
        not_matched="forward passes a step (three instead of one)",
    ),
    "harmofl-new-site": Claim(
        "Amplitude normalisation and ascent (HarmoFL) make a better model for a new site than FedAvg.",
        "harmofl",
        "fedavg",
        "personal_both.jsonl",
        +1,
        "new site",
        source="jiang2022harmofl",
        not_matched="gradients a step (two instead of one), the mean's weights",
    ),
    "feddg-new-site": Claim(
        "Episodes in the others' styles (FedDG) make a better model for a new site than FedAvg.",
        "feddg",
        "fedavg",
        "personal_both.jsonl",
        +1,
        "new site",
        source="liu2021feddg",
        not_matched="gradients a step (three instead of one)",
    ),
    "feddg-episode": Claim(
        "FedDG's inner step and contrast add something to training on restyled images.",
        "feddg",
        "feddg:contrast=0,inner=0",
        "personal_both.jsonl",
        +1,
        "new site",
        source="liu2021feddg",
        not_matched="nothing",
    ),
    "iop-new-site": Claim(
        "A mixture of the sites' models routed by entropy (IOP-FL) is better for a new site than FedAvg's model.",
        "iop",
        "fedavg",
        "personal_both.jsonl",
        +1,
        "new site",
        source="jiang2023iopfl",
        not_matched="unlabelled test images of the new site (seen by IOP-FL alone)",
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
    **PRIVACY,
}


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about one claim."""

    claim: Claim
    difference: Difference | None
    p: float | None  # Holm-corrected over its part's claims that have results
    word: str  # supported, contradicted, not supported, inconclusive, not run

    def _repr_markdown_(self) -> str:
        claim, d = self.claim, self.difference
        compared = " − ".join(claim.title(arm) for arm in (claim.a, claim.b) if arm)
        expected = {1: "positive", -1: "negative", 0: f"within ±{claim.margin:g}"}[claim.sign]
        lines = [
            f"**Claim.** {claim.text}",
            "",
            "| | |",
            "|---|---|",
            f"| verdict | **{self.word}** |",
            f"| expected | {compared}, {claim.measured}: {expected} |",
        ]
        if d is not None:
            p = f", p = {self.p:.3f} (Holm)" if self.p is not None else ""
            lines.append(f"| measured | {d.mean:+.4f}, 95 % interval [{d.low:+.4f}, {d.high:+.4f}]{p} |")
            what, where = ("splits", "task") if claim.shots else ("seeds", "site")
            lines.append(f"| paired over | {d.seeds} {what} × {d.sites} {where}{'s' if d.sites > 1 else ''} |")
        lines += [
            f"| matched | {claim.matched} |",
            f"| not matched | {claim.not_matched} |",
            f"| runs | {', '.join(f'`results/{file}`' for file in claim.files)} |",
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
    if folder is None or not all((folder / file).is_file() for file in claim.files):
        return None
    return _measured(claim, folder, tuple((folder / file).stat().st_mtime_ns for file in claim.files))


@lru_cache(maxsize=256)
def _measured(claim: Claim, folder: Path, written: tuple[int, ...]) -> Difference | None:
    """Computed once for files that were last `written` then; None while a file lacks one of the arms."""

    if not claim.shots and any(
        arm not in arms(read_results([folder / f"{file}.jsonl"]))
        for arm, file in claim.parts(claim.a) + claim.parts(claim.b)
    ):
        return None

    def read(text: str) -> NDArray[np.float64]:
        if claim.shots:
            return fewshot.table_of(read_results([folder / claim.results]), text, claim.shots, claim.metric)
        tables = [
            table_of(read_results([folder / f"{file}.jsonl"]), arm, claim.protocol, claim.metric)
            for arm, file in claim.parts(text)
        ]
        if len({table.shape for table in tables}) > 1:
            raise FedloraError(f"'{text}' has not the same seeds and sites in every term")
        return tables[0] - sum(tables[1:])

    a = read(claim.a)
    b = read(claim.b) if claim.b else np.zeros_like(a)
    if not a.size or a.shape != b.shape:
        raise FedloraError(f"{', '.join(claim.files)} do not hold both {claim.a} and {claim.b} with the same seeds")
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
    """All verdicts. The p-values of one part of the book are corrected together, so that no later part moves them."""
    table = CLAIMS if claims is None else claims
    found = {key: _difference(claim) for key, claim in table.items()}
    tested = {key: d for key, d in found.items() if d is not None}
    corrected: dict[str, float] = {}
    for part in {table[key].part for key in tested}:
        own = [key for key in tested if table[key].part == part]
        corrected |= zip(own, holm([tested[key].p_bootstrap for key in own]), strict=True)
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
