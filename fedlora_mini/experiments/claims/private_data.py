"""Part III's claims on other data than the digits: MNIST, and masks on the phantom and on nuclei."""

from typing import Any

from fedlora_mini.experiments.claims.claim import Claim
from fedlora_mini.experiments.claims.privacy import BUDGET, LOW, PERMUTED, RESCALED, SITES, private
from fedlora_mini.experiments.private import AS, CELLS, COIN

OVER_HALF = "LA-LoRA also beats DP-LoRA with K/2 steps."
HALF: dict[str, Any] = {
    "source": "",
    "matched": f"epsilon, delta, rounds, noisy steps per factor, {BUDGET}",
    "not_matched": "local steps, updates of the head, bytes per step, numbers noised in a step",
}
FILTER: dict[str, Any] = {"not_matched": "nothing but the filter"}
ELSEWHERE: dict[str, Claim] = {
    # the interaction: convolutions' kernels are the only smooth gradients here, and only the phantom's network has some
    **{
        f"filter-{name}{suffix}-phantom": private(
            f"Segmenting the phantom, the low-pass filter {text} {title}.",
            f"{arm}{LOW}",
            f"{arm}{other}",
            "phantom",
            source="",
            not_matched="nothing but the filter",
            seen=True,
            **SITES,
        )
        for arm, name, title in (("la_lora", "la", "LA-LoRA"), ("fedit", "dplora", "DP-LoRA"))
        for other, suffix, text in (
            (PERMUTED, "-over-permuted", "along the features' own order beats a permuted order, with"),
            (RESCALED, "-over-rescaled", "beats a gradient that is only made as short, with"),
        )
    },
    **{
        f"filter-{name}-interaction": private(
            f"What the features' own order is worth to the filter, {title}: more on the phantom, whose network has "
            "kernels throughout its decoder, than on the digits, which have linear layers and a patch convolution.",
            f"{arm}{LOW}@private_phantom - {arm}{PERMUTED}@private_phantom",
            f"{arm}{LOW}@private_main - {arm}{PERMUTED}@private_main",
            "phantom",
            metric="score",
            margin=0.005,
            source="",
            matched="seeds; within each set all but the filter's order",
            not_matched="network, task and score (Dice on the phantom, accuracy on the digits)",
            apart=True,
            seen=True,
        )
        for arm, name, title in (("la_lora", "la", "LA-LoRA"), ("fedit", "dplora", "DP-LoRA"))
    },
    # other data: five thousand of MNIST, and masks
    "la-over-rolora-mnist": private(
        "On MNIST LA-LoRA beats RoLoRA, both without a filter.", "la_lora", "rolora", "mnist"
    ),
    **{
        f"la-over-rolora-mnist_{cell}": private(
            f"On MNIST at epsilon {told['epsilon']:g} and Dirichlet {told['dirichlet']:g} LA-LoRA beats RoLoRA, both "
            "without a filter.",
            "la_lora",
            "rolora",
            f"mnist_{cell}",
        )
        for cell, told in CELLS.items()
    },
    "la-over-dplora-mnist": private("On MNIST LA-LoRA beats DP-LoRA.", "la_lora", "fedit", "mnist"),
    "la-over-dplora-half-mnist": private(
        f"On MNIST {OVER_HALF}",
        "la_lora",
        "fedit@private_mnist_half",
        "mnist",
        **HALF,
    ),
    "la-over-rolora-mnist-long": private(
        "With twice the rounds and twice the batch, LA-LoRA beats RoLoRA on MNIST.", "la_lora", "rolora", "mnist_long"
    ),
    "la-over-dplora-mnist-long": private(
        "With twice the rounds and twice the batch, LA-LoRA beats DP-LoRA on MNIST.", "la_lora", "fedit", "mnist_long"
    ),
    "b-first-mnist": private("On MNIST B first beats A first.", "la_lora", "la_lora:first=A", "mnist"),
    **{
        f"{name}-{where}": private(f"Segmenting {what}, {text}", a, b, where, **more, **SITES)
        for where, what in (("phantom", "the phantom"), ("nuclei", "nuclei"))
        for name, text, a, b, more in (
            ("la-over-rolora", "LA-LoRA beats RoLoRA, both without a filter.", "la_lora", "rolora", {}),
            ("la-over-dplora", "LA-LoRA beats DP-LoRA.", "la_lora", "fedit", {}),
            ("la-over-dplora-half", OVER_HALF, "la_lora", f"fedit@private_{where}_half", HALF),
            ("filter-la", "the low-pass filter helps LA-LoRA.", f"la_lora{LOW}", "la_lora", FILTER),
        )
    },
    "as-over-rolora-mnist": private(
        "On MNIST AS-LoRA beats RoLoRA at about equal bytes.",
        AS,
        "rolora",
        "mnist",
        source="kim2026aslora",
        not_matched="bytes by layer: one number a layer beside its factor",
    ),
    "as-over-coin-mnist": private(
        "On MNIST AS-LoRA beats itself with every layer's factor chosen by coin.",
        AS,
        f"{COIN}@private_mnist_rest",
        "mnist",
        source="",
        not_matched="the score",
        seen=True,
    ),
}
