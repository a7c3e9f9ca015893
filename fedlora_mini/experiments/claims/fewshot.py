"""Part I: a new structure from five or ten images, ARENA against LoRA, what its l1 norm does, full fine-tuning."""

from fedlora_mini.experiments.claims.claim import MARGIN, Claim


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


FEWSHOT: dict[str, Claim] = {
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
        not_matched="trained parameters (five times as many)",
    ),
    "arena-over-sora": _fewshot(
        "Proximal steps on v (ARENA) score higher than SoRA's thresholded Adam steps.",
        "arena-8",
        "sora",
        +1,
        not_matched="λ and ρ: ARENA's were chosen on the tuning task, SoRA's are those of its code",
    ),
}
