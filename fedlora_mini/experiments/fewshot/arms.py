"""What is compared from few images: an adapter, its options, and what belongs to its training. One row an arm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import nn

from fedlora_mini.accepted import fitting
from fedlora_mini.adapters.select import select_directions
from fedlora_mini.data import Split
from fedlora_mini.errors import unknown
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.regularizers import Regularizer
from fedlora_mini.regularizers.companions import COMPANIONS, FURTHER, companions
from fedlora_mini.state import State


def _select(model: nn.Module, state: State, few: Split) -> State:
    """SubLoRA's choice after training, by the loss on the labelled images: four directions a layer in the mean."""
    return select_directions(model, state, [(few.images, few.masks)], segmentation_loss, rank=4)


@dataclass(frozen=True)
class Arm:
    """`base="none"`: from random weights. `finish` changes the trained state before it is scored."""

    title: str
    adapter: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)  # options of the adapter's regularisers
    base: str = "auto"
    finish: Callable[[nn.Module, State, Split], State] | None = None

    def objective(self, **changes: Any) -> tuple[Regularizer, ...]:
        """The adapter's regularisers. Raises for a change that none of them has, or of another type than theirs."""
        takers = [table[self.adapter] for table in (FURTHER, COMPANIONS) if self.adapter in table]
        kinds = {name: kind for taker in takers for name, kind in get_type_hints(taker).items()}
        fit = {n: fitting(f"option '{n}' of '{self.title}'", v, kinds.get(n, Any)) for n, v in changes.items()}
        return companions(self.adapter, **{**self.training, **fit})


LORA_RANKS = (1, 2, 4, 8, 16, 32)
ARENA_RANKS = (4, 8, 16, 32)

# ARENA from the start without a gauge (unit rows and columns, v = 0); lambda and rho were chosen on "kidneys-shifted".
LAMBDA = 1e-2
_ARENA = {"lam": LAMBDA, "rho": 0.1}


def _arena(rank: int, title: str = "", **training: Any) -> Arm:
    return Arm(title or f"ARENA r={rank}", "arena", {"rank": rank, "start": "unit"}, _ARENA | training)


ARMS: dict[str, Arm] = {
    "scratch": Arm("from scratch", "full", base="none"),
    "head": Arm("linear probe", "head"),
    "bitfit": Arm("BitFit", "bitfit"),
    "affine": Arm("affine norms", "affine"),
    "adaptformer": Arm("AdaptFormer", "adaptformer"),
    **{f"lora-{r}": Arm(f"LoRA r={r}", "lora", {"rank": r}) for r in LORA_RANKS},
    "adalora": Arm("AdaLoRA 8 to 4", "adalora", {"rank": 8}, {"final": 4}),
    "sora": Arm("SoRA r=8", "sora", {"rank": 8}),
    **{f"arena-{r}": _arena(r) for r in ARENA_RANKS},
    "full": Arm("full fine-tuning", "full"),
}

# Arms that answer one question each and are run by name.
EXTRA: dict[str, Arm] = {
    # lambda up and down
    **{f"arena-16-lam{lam:g}": _arena(16, f"ARENA r=16, λ={lam:g}", lam=lam) for lam in (0.0, 1e-3, 3e-3, 3e-2)},
    # lambda grows from 0 to a tenth in 60 steps, in the unit gauge: a direction may turn before it is judged
    **{f"grown-{r}": _arena(r, f"ARENA r={r}, growing λ", lam=0.0, ramp=(0.1, 60), gauge="unit") for r in ARENA_RANKS},
    # the gauge: LoRA's start, v free to shrink while B grows, with and without the penalty, and with the gauge fixed
    "free-lam0": Arm("v from 1, λ=0", "arena", {"rank": 8}, {"lam": 0.0, "rho": 0.1}),
    "free-lam": Arm("v from 1, λ=0.1", "arena", {"rank": 8}, {"lam": 0.1, "rho": 0.1}),
    "arena-8-fixed": _arena(8, "ARENA r=8, unit gauge kept", gauge="unit"),
    # other ways to choose a rank
    "aroma": Arm("AROMA", "aroma", {"rank": 8}, {"check": 5, "inner_tol": 0.1, "longest": 20}),
    "sublora": Arm("SubLoRA 8 to 4", "sublora", {"rank": 8}, finish=_select),
    "sr-lora": Arm("SR-LoRA", "sr_lora"),
    "sara": Arm("SARA", "sara"),
    "prilora": Arm("PRILoRA", "prilora"),
}


def arm(name: str) -> Arm:
    """The row of that name."""
    table = ARMS | EXTRA
    if name not in table:
        raise unknown("arm", name, table)
    return table[name]
