"""FedAS, Yang et al. 2024: a received body is first fitted to the client's own prototypes; informed clients weigh more.

1. Before training the received body moves, for some steps, so that z's class means are again those that the client's
last own model had: min Σ_y ||z̄_y - c_y||². 2. The client tells the trace of its empirical Fisher information,
Σ_i mean over images of (∂ℓ/∂θ_i)², and the server weighs by it. The published code squares the gradient of a batch;
here it is per image, which is what the name says (`diagonal_fisher`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.federation.aggregation.messages import WEIGHT
from fedlora_mini.federation.fisher import diagonal_fisher
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.federation.works.prototypes import prototypes
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.regularizers.prototype import distance
from fedlora_mini.state import State

MINE = "~mine"


@dataclass(frozen=True)
class ToMine(Regularizer):
    """Only the alignment drives the step: the task's gradient is replaced by that of Σ_y ||z̄_y - c_y||²."""

    target: Tensor  # (C, c)

    label = "own prototypes"
    grouped = False

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        leaves = {name: state[name].detach().requires_grad_() for name in gradient}
        with torch.enable_grad():
            z = context.run({**state, **leaves}, context.x)[1]
            value = distance(z, context.y, self.target)
            new = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, new, strict=True):
            if g is None:
                del gradient[name]  # the head: without a gradient it keeps its bits, also under weight decay
            else:
                gradient[name] = g


@dataclass(frozen=True)
class FedAS(Work):
    """steps: of alignment, from the second round on. images: at most so many for the Fisher information.

    The paper has one pass at the rate 0.01: `passes=1, rate=0.01`. passes: in the place of steps; rate: of the
    alignment alone, None = the run's.
    """

    steps: int = 2
    passes: int | None = None
    rate: float | None = None
    images: int = 32

    messages = (WEIGHT,)
    notes = (MINE,)

    def __post_init__(self) -> None:
        ranges(self, steps="[1, inf)", passes="(0, inf)", rate="(0, inf)", images="[1, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        long = f"{self.steps} steps" if self.passes is None else f"{self.passes:g} passes"
        return f"aligned to own prototypes ({long}), weight by Fisher information"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        start, mine = client.tensors, client.memory.get(MINE)
        if mine is not None:
            own = client.setting.budget
            budget = replace(own, steps=self.steps, passes=self.passes, lr=own.lr if self.rate is None else self.rate)
            start, _ = client.fit(round, start, "align", budget, objective=(ToMine(mine),))
        end, loss = client.fit(round, start)
        client.memory[MINE] = prototypes(client, end)[0]
        fisher = diagonal_fisher(client.setting.model, end, client.data, self.images)
        trace = torch.stack([value.sum() for value in fisher.values()]).sum()
        return end, loss, {WEIGHT: trace.reshape(())}
