"""Local training: E steps on one client's data, or on several clients' at once along the group axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import Adapter, Key, adapters
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.group import Group, changes_images
from fedlora_mini.federation.row import Method
from fedlora_mini.privacy.dpsgd import Guarded, GuardedGroup
from fedlora_mini.regularizers import Context
from fedlora_mini.state import State

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""step (from 1) -> images (K*b, C, *S) and masks (K*b, *S), client by client."""

OPTIMISERS: dict[str, Callable[[list[Tensor], "Budget"], torch.optim.Optimizer]] = {
    "adam": lambda p, budget: torch.optim.AdamW(p, lr=budget.lr, weight_decay=budget.weight_decay),
    "sgd": lambda p, budget: torch.optim.SGD(p, lr=budget.lr, weight_decay=budget.weight_decay),
}


def constant(done: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(done: float, warmup: float = 0.05) -> float:
    """Linear warm-up over the first twentieth, then half a cosine to zero. `done` is the share of the steps, (0, 1]."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


PACES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}

Stop = Callable[[int, list[float]], bool]
"""(step, the clients' losses) -> whether training ends after this step."""


@dataclass(frozen=True)
class Budget:
    """What one round of local work costs: the same for every arm of a comparison."""

    steps: int = 10
    batch: int = 8
    lr: float = 5e-3
    optimiser: str = "adam"
    weight_decay: float = 0.0
    augment: bool = True
    pace: str = "constant"  # how the rate moves over the steps of a round
    passes: float | None = None  # steps by the client's own data instead: so many times through it

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        if self.pace not in PACES:
            raise unknown("pace", self.pace, PACES)
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise FedloraError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "passes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FedloraError(f"{name} must be positive, got {value}")

    def of(self, images: int) -> "Budget":
        """The budget of a client with so many training images."""
        if self.passes is None:
            return self
        return replace(self, steps=max(1, round(self.passes * images / self.batch)), passes=None)


def moves_at_all(key: Key, layers: Mapping[str, Adapter]) -> bool:
    """Whether an optimiser may move it: no statistics, nothing that its adapter keeps still."""
    if key.factor.startswith("running_"):
        return False
    return key.path not in layers or key.factor not in layers[key.path].still


def train(
    model: nn.Module,
    method: Method,
    keys: Mapping[str, Key],
    states: list[State],
    batches: Batches,
    budget: Budget,
    round: int,
    precision: str = "float32",
    stop: Stop = lambda step, losses: False,
    kept: Sequence[Mapping[str, Tensor]] = (),
    guard: Guarded | GuardedGroup | None = None,
) -> tuple[list[State], list[float]]:
    """K start states -> K end states and K mean losses.

    With K > 1 the states are stacked and every factor carries a group axis of K; the loss is the sum of the clients'
    mean losses, so that no client's gradient sees another's data. The optimiser starts anew each round. `kept`: every
    client's notes, for the terms that read them. guard: what makes the clients' gradients private; then the loss is
    not told, batches may be empty and of unequal sizes, and terms that call themselves free see no image.

    Raises for K > 1 with a term that takes one client at a time, and under a guard for one that changes images.
    """
    terms = method.objective
    if len(states) > 1 and (alone := [term.label for term in terms if not term.grouped]):
        raise FedloraError(f"'{alone[0]}' needs clients one after the other: use execution 'sequential'")
    if guard is not None and (changing := [term.label for term in terms if changes_images(term)]):
        raise FedloraError(f"'{changing[0]}' changes the images of a step: under privacy no term may")
    layers, pace = dict(adapters(model)), PACES[budget.pace]
    context = Context(round, 0, {}, dict(keys), budget.lr, budget.steps, layers=layers)
    group = Group.of(model, terms, states, context, kept, precision, guard)
    params = group.params
    movable = [name for name in params if name in keys and moves_at_all(keys[name], layers)]
    notes: Mapping[str, Tensor] = kept[0] if kept else {}  # what the server told is the same for all
    optimiser = OPTIMISERS[budget.optimiser]([params[name] for name in movable], budget)
    total, done = torch.zeros(len(states), device=next(iter(params.values())).device), 0
    for step in range(1, budget.steps + 1):
        for name in movable:
            params[name].requires_grad_(method.schedule(keys[name], round, step, budget.steps, notes))
        now = pace(step / budget.steps)
        optimiser.param_groups[0]["lr"] = lr = budget.lr * now
        moves = frozenset(name for name in movable if params[name].requires_grad)
        x, y = group.begin(*batches(step), step=step, lr=lr, pace=now, moves=moves, restart=set())
        optimiser.zero_grad(set_to_none=True)  # what has no gradient, the optimiser leaves alone
        if guard is None:
            value, losses = group.objective(x, y)
            value.backward()
        else:
            losses = torch.full_like(total, math.nan)
            group.release_(x, y)
        group.change_gradients_()
        optimiser.step()
        for name in group.proximal_steps_():
            optimiser.state.pop(params[name], None)
        total, done = total + losses, done + 1
        if stop(step, losses.tolist()):
            break
    return group.ends(), (total / done).tolist()
