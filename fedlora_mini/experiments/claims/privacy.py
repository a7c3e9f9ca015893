"""Part III's claims: what privacy costs, LA-LoRA, its filter, AS-LoRA, what headlines compare.

Written down before their first runs, but for those that say `seen`. Most files have since been made again (`again`),
with test images that no search meets and rates from two seeds, the nuclei with eight clients; claims on them stand as
they were written.

All arms of one file have the same epsilon, rounds, local steps, clip, expected batch, data and starts, and each has its
rate from one grid. `private_half` has half the local steps with the noise recalibrated. Chapters 17, 18.
"""

from typing import Any

from fedlora_mini.experiments.claims.claim import Claim
from fedlora_mini.experiments.private import AS
from fedlora_mini.experiments.private import CELLS as ALL_CELLS

LA = "liu2026lalora"
BUDGET = "expected batch, clip, data, rank; each rate from one grid"
SAME = f"epsilon, delta, rounds, local steps, {BUDGET}"
ONCE = {"noise", *(f"mnist_{cell}" for cell in ALL_CELLS)}  # parts whose runs were made once
POINT = 0.01  # one point of accuracy: smaller differences count as none
LOW, PERMUTED, RESCALED = (f":filter={kind}" for kind in ("low-pass", "permuted", "rescaled"))


def private(
    text: str,
    a: str,
    b: str,
    part: str = "main",
    sign: int = +1,
    *,
    protocol: str = "global",
    metric: str = "accuracy",
    margin: float = POINT,
    source: str = LA,
    matched: str = SAME,
    not_matched: str = "bytes sent, and where arms differ in them numbers noised in a step",
    **more: Any,
) -> Claim:
    """A claim on one part of the private study: a against b at one budget, rounds, steps and data."""
    file = f"private_{part}.jsonl"
    more = {"again": part not in ONCE} | more
    return Claim(text, a, b, file, sign, protocol, metric, margin, source, matched, not_matched, **more)


CELLS = {
    "e1": "at ε = 1",
    "e8": "at ε = 8",
    "d03": "with labels dealt more evenly (Dirichlet 0.3)",
    "d05": "with labels dealt still more evenly (Dirichlet 0.5)",
    "d03_e1": "at ε = 1 and Dirichlet 0.3",
    "d03_e8": "at ε = 8 and Dirichlet 0.3",
    "d05_e1": "at ε = 1 and Dirichlet 0.5",
    "d05_e8": "at ε = 8 and Dirichlet 0.5",
}
SITES: dict[str, Any] = {"metric": "dice", "margin": 0.005}  # half a Dice point

DIGITS: dict[str, Claim] = {
    # what privacy costs
    **{
        f"{name}-costs{suffix}": private(
            f"{where} {text}",
            f"fedit@private_{part}{without}",
            "fedit",
            f"{part}main".removesuffix("_main"),
            source="",
            matched=f"rounds, local steps, {BUDGET}",
            not_matched=other,
            seen=True,
            **more,
        )
        for name, text, without, other in (
            ("privacy", "DP-LoRA is worse than without privacy.", "open", "clipping, noise, how batches are drawn"),
            ("noise", "DP-LoRA is worse than with its clipping alone.", "clipped", "noise"),
        )
        for suffix, where, part, more in (
            ("", "At ε = 3", "", {}),
            ("-mnist", "On MNIST at ε = 3", "mnist_", {}),
            ("-phantom", "Segmenting the phantom at ε = 3", "phantom_", SITES),
            ("-nuclei", "Segmenting nuclei at ε = 3", "nuclei_", SITES),
        )
    },
    "budget-costs": private(
        "DP-LoRA is better at ε = 8 than at ε = 1.",
        "fedit@private_e8",
        "fedit",
        "e1",
        source="",
        matched=f"delta, rounds, local steps, {BUDGET}",
        not_matched="epsilon",
        seen=True,
    ),
    # L1
    "noise-above-alternating": private(
        "Moving both factors in all K steps puts more noise into BA than alternating between them.",
        "fedit",
        "la_lora",
        "noise",
        protocol="server",
        metric="energy",
        margin=0.1,
        matched="noise multiplier, rounds, local steps, rate, start",
        not_matched="noisy steps per factor: K against K/2",
    ),
    "noise-alternating-is-half": private(
        "Alternating for K steps puts as much noise into BA as moving both factors for K/2 (log energy within ±0.1).",
        "la_lora",
        "fedit@private_noise_half",
        "noise",
        0,
        protocol="server",
        metric="energy",
        margin=0.1,
        source="",
        matched="noise multiplier, noisy steps per factor, rounds, rate, start",
        not_matched="local steps: K against K/2",
        seen=True,  # of 32 seeds the first eight, before the others were added
    ),
    # L2
    "la-over-dplora": private("At equal ε and K, LA-LoRA beats DP-LoRA.", "la_lora", "fedit"),
    "la-over-dplora-half": private(
        "LA-LoRA also beats DP-LoRA with K/2 steps, which noises each factor as often and needs less noise.",
        "la_lora",
        "fedit@private_half",
        source="",
        matched=f"epsilon, delta, rounds, noisy steps per factor, {BUDGET}",
        not_matched="local steps, updates of the head, bytes per step, numbers noised in a step",
    ),
    "half-over-full": private(
        "DP-LoRA gains from halving its steps and the noise that they need, so that LA-LoRA's margin shrinks.",
        "fedit@private_half",
        "fedit",
        source="",
        matched=f"epsilon, delta, rounds, {BUDGET}",
        not_matched="local steps, noise multiplier",
    ),
    "la-filter-over-dplora-filter": private(
        "With the low-pass filter in both arms, LA-LoRA beats DP-LoRA.", f"la_lora{LOW}", f"fedit{LOW}"
    ),
    "b-first": private(
        "LA-LoRA with B first beats A first, whose first step at B = 0 is noise.", "la_lora", "la_lora:first=A"
    ),
    "la-preconditioned": private("The preconditioner helps LA-LoRA.", "la_lora_pre", "la_lora", not_matched="nothing"),
    # L3
    **{
        f"filter-{name}{suffix}": private(
            f"The low-pass filter {text} {title}.",
            f"{arm}{LOW}",
            f"{arm}{other}",
            source=LA if not other else "",
            not_matched="nothing but the filter",
        )
        for arm, name, title in (("la_lora", "la", "LA-LoRA"), ("fedit", "dplora", "DP-LoRA"))
        for other, suffix, text in (
            ("", "", "helps"),
            (PERMUTED, "-over-permuted", "along the features' own order beats a permuted order, with"),
            (RESCALED, "-over-rescaled", "beats a gradient that is only made as short, with"),
        )
    },
    "filter-over-doppler": private(
        "Smoothing along features beats smoothing along time (DOPPLER), on DP-LoRA.",
        f"fedit{LOW}",
        "fedit:filter=doppler",
        not_matched="nothing but the filter",
    ),
    # L4
    "rolora-over-ffa-open": private(
        "Without privacy RoLoRA passes below FFA-LoRA's floor.",
        "rolora",
        "ffa",
        "open",
        matched="rounds, local steps, batches, data, rank; each rate from one grid",
        not_matched="bytes: those of A in every second round",
    ),
    "la-over-ffa-open": private(
        "Without privacy LA-LoRA passes below FFA-LoRA's floor.",
        "la_lora",
        "ffa",
        "open",
        matched="rounds, local steps, batches, data, rank; each rate from one grid",
        not_matched="bytes sent: half as many again",
    ),
    # L5
    "la-flatter": private(
        "At equal training loss LA-LoRA's λ_max is below DP-LoRA's (log).",
        "la_lora",
        "fedit",
        "sharpness",
        -1,
        protocol="server",
        metric="log_lambda_max",
        margin=0.1,
        matched="epsilon, rounds, local steps; the training loss, on the line between the two rounds that pass it",
        not_matched="the round",
    ),
    # the headline at equal bytes
    **{
        f"la-over-rolora{suffix}-bytes": private(
            f"{where} LA-LoRA beats a RoLoRA that runs on until it has sent as many bytes.",
            "la_lora",
            f"rolora@private_{prefix}bytes_{rounds}",
            part,
            matched=f"epsilon, delta, bytes sent, local steps, {BUDGET}",
            not_matched=f"rounds: {own} against {rounds}",
            again=False,
            **more,
        )
        for suffix, where, prefix, part, own, rounds, more in (
            ("", "On the digits", "", "main", 10, 16, {}),
            ("-mnist", "On MNIST", "mnist_", "mnist", 10, 16, {}),
            ("-phantom", "On the phantom", "phantom_", "phantom", 6, 12, SITES),
        )
    },
    # the headline, like for like
    "headline-as-printed": private(
        "LA-LoRA with its filter beats RoLoRA without one: the comparison behind +16.83.",
        f"la_lora{LOW}",
        "rolora",
        not_matched="the filter, bytes sent, numbers noised in a step",
    ),
    "headline-both-without": private(
        "Without a filter in either arm (+8.87), LA-LoRA beats RoLoRA.", "la_lora", "rolora"
    ),
    "headline-both-with": private(
        "With the filter in both arms, which the paper does not report, LA-LoRA beats RoLoRA.",
        f"la_lora{LOW}",
        f"rolora{LOW}",
        source="",
    ),
    **{
        f"la-over-rolora-{cell}": private(
            f"LA-LoRA beats RoLoRA {where}, both without a filter.", "la_lora", "rolora", cell
        )
        for cell, where in CELLS.items()
    },
    # S1
    "as-aggregates-exactly": private(
        "AS-LoRA's aggregation error is zero.",
        AS,
        "",
        sign=0,
        protocol="server",
        metric="agg_err",
        margin=1e-5,
        source="kim2026aslora",
        not_matched="nothing: one arm",
    ),
    "as-over-rolora": private(
        "At about equal bytes, layers that choose for themselves (AS-LoRA) beat fixed alternation by round (RoLoRA).",
        AS,
        "rolora",
        source="kim2026aslora",
        not_matched="bytes by layer: one number a layer beside its factor",
    ),
    "as-loss-below-rolora": private(
        "And their loss on test images is lower.",
        AS,
        "rolora",
        sign=-1,
        metric="loss",
        margin=0.02,
        source="kim2026aslora",
        not_matched="bytes by layer: one number a layer beside its factor",
    ),
}
