"""AS-LoRA's client: trains the factor that the server named, and scores it by the last private gradient of the round.

S = max(||g||^2 - d s^2, 0) - (eta kappa / 2) ||g||^2: the decrease of the loss that a step of size eta would bring, to
second order, with the noise's own energy taken off (d numbers with noise of deviation s each). Chapter 18.

kappa is the curvature along g. curvature "released" takes it from two released gradients of the same factor, kappa =
<g - g', theta - theta'> / ||theta - theta'||^2, which costs nothing more; "raw" is what the published code means, the
curvature of the loss on the step's private images: not private, and refused under a budget (with noise alone the record
says so); "none" leaves it out.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.aggregation.selection import SCORE
from fedlora_mini.federation.row import Work
from fedlora_mini.federation.schedule import chosen
from fedlora_mini.losses import task_loss
from fedlora_mini.metrics.sharpness import hvp
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.regularizers.base import EMPTY
from fedlora_mini.state import State

if TYPE_CHECKING:
    from fedlora_mini.federation.member import Member

CURVATURES = ("released", "none", "raw")
LAST = 10  # rounds, at the end, in which the published code looks at curvature
GRADIENT, PLACE = "~as/g/", "~as/at/"  # the last released gradient of every factor, and where it was taken


@dataclass
class Recorder(Regularizer):
    """Keeps the last step's gradient as it was released and where; with `raw` also on what, and then it is not free.

    It stands before any filter.
    """

    last: State = field(default_factory=dict)
    at: State = field(default_factory=dict)
    drawn: tuple[Tensor, Tensor] = (EMPTY, EMPTY)
    raw: bool = False
    label = "records the last gradient"

    @property
    def free(self) -> bool:  # type: ignore[override]
        return not self.raw

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        if context.step == context.steps:
            self.last, self.at = S.clone(gradient), S.clone({name: state[name] for name in gradient})
            if self.raw:
                self.drawn = context.x, context.y


def score(g: Tensor, noise: float, eta: float, kappa: float) -> float:
    """S for one factor's gradient; noise: deviation of the noise on each of its numbers."""
    energy = float(g.double().square().sum())
    return max(energy - g.numel() * noise**2, 0.0) - 0.5 * eta * kappa * energy


@dataclass(frozen=True)
class Selected(Work):
    """The work of an AS-LoRA client. since: the first round whose scores hold a curvature; before, energy alone.

    None: the first of all, with "raw" the first of the run's last ten, as in the published code.
    """

    curvature: str = "released"
    since: int | None = None

    messages = (f"{SCORE}*",)
    notes = (GRADIENT, PLACE)

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise unknown("curvature of AS-LoRA", self.curvature, CURVATURES)
        if self.since is not None and self.since < 1:
            raise FedloraError(f"since must be a round, at least 1, got {self.since}")

    def within(self, rounds: int) -> "Selected":
        """The work in a run of so many rounds."""
        return self if self.since or self.curvature != "raw" else replace(self, since=max(1, rounds - LAST + 1))

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"scores its layers, curvature {self.curvature}{'' if self.free else ' (not DP)'}"

    @property
    def free(self) -> bool:
        return self.curvature != "raw"

    def round(self, client: "Member", round: int) -> tuple[State, float, State]:
        """Train; say S of every factor that moved, and keep its gradient and place for the next round's curvature."""
        own, recorder = client.setting, Recorder(raw=self.curvature == "raw")
        end, loss = client.fit(round, objective=(recorder, *own.method.objective))
        guard = own.guard
        noise = guard.mechanism.noise_std / (guard.mechanism.q * len(client.data)) if guard else 0.0
        past, where = client.recall(GRADIENT), client.recall(PLACE)
        say: State = {}
        for name, g in recorder.last.items():
            key = own.keys[name]
            if key.factor in "AB" and chosen(key, client.notes):
                seen = past.get(name), where.get(name)
                kappa = self._kappa(client, name, recorder, *seen) if round >= (self.since or 1) else 0.0
                say[f"{SCORE}{key.path}"] = torch.tensor(score(g, noise, own.budget.lr, kappa), dtype=torch.float64)
        client.keep(GRADIENT, past | recorder.last)
        client.keep(PLACE, where | recorder.at)
        return end, loss, say

    def _kappa(self, client: "Member", name: str, now: Recorder, past: Tensor | None, where: Tensor | None) -> float:
        if self.curvature == "raw":
            return self._raw(client, name, now)
        if self.curvature == "none" or past is None or where is None:
            return 0.0
        moved = (now.at[name] - where).double()
        length = float(moved.square().sum())
        return float(((now.last[name] - past).double() * moved).sum()) / length if length else 0.0

    def _raw(self, client: "Member", name: str, now: Recorder) -> float:
        """v^T H v along v = g / ||g||, H that of the loss on the last step's images.

        The published code takes (L(theta + h v) - 2 L(theta) + L(theta - h v)) / h^2 with h = 1e-3, which tends to
        this; in single precision its rounding, about 1e-7 L / h^2, is as large as the curvature.
        """
        v = now.last[name] / now.last[name].norm().clamp(min=1e-12)
        x, y = now.drawn
        if len(x) == 0:  # Poisson sampling drew nobody
            return 0.0
        found = hvp(client.setting.model, client.tensors | now.at, task_loss, x, y, {name: v})
        return float((found[name] * v).double().sum())
