"""Local training: E steps on one client's data, or on several clients' at once along the group axis."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key, call
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.methods import Method
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.regularizers import Context
from fedlora_mini.state import State

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""step (from 1) -> images (K*b, C, *S) and masks (K*b, *S), client by client."""

OPTIMISERS: dict[str, Callable[[list[Tensor], "Budget"], torch.optim.Optimizer]] = {
    "adam": lambda p, budget: torch.optim.AdamW(p, lr=budget.lr, weight_decay=budget.weight_decay),
    "sgd": lambda p, budget: torch.optim.SGD(p, lr=budget.lr, weight_decay=budget.weight_decay),
}


@dataclass(frozen=True)
class Budget:
    """What one round of local work costs: the same for every arm of a comparison."""

    steps: int = 10
    batch: int = 8
    lr: float = 5e-3
    optimiser: str = "adam"
    weight_decay: float = 0.0
    augment: bool = True

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise FedloraError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise FedloraError(f"lr must be positive, got {self.lr}")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """float32, or bf16 where matrix products are concerned."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def train(
    model: nn.Module,
    method: Method,
    keys: Mapping[str, Key],
    states: list[State],
    batches: Batches,
    budget: Budget,
    round: int,
    precision: str = "float32",
) -> tuple[list[State], list[float]]:
    """K start states -> K end states and K mean losses.

    With K > 1 the states are stacked and every factor carries a group axis of K; the loss is the sum of the clients'
    mean losses, so that no client's gradient sees another's data. The optimiser starts anew each round.
    """
    K, grouped = len(states), len(states) > 1
    params = S.stack(states) if grouped else S.clone(states[0])
    movable = [name for name in params if not keys[name].factor.startswith("running_")]
    optimiser = OPTIMISERS[budget.optimiser]([params[name] for name in movable], budget)
    contexts = [Context(round, 0, start, dict(keys), budget.lr) for start in states]
    device = next(iter(params.values())).device
    total = torch.zeros(K, device=device)
    for step in range(1, budget.steps + 1):
        for name in movable:
            params[name].requires_grad_(method.schedule(keys[name], round, step))
        x, y = batches(step)
        with autocast(device, precision):
            logits = call(model, params, x)
        losses = segmentation_loss(logits, y).view(K, -1).mean(1)  # (K,)
        objective = losses.sum()
        if method.objective:
            views = S.unstack(params) if grouped else [params]
            contexts = [Context(c.round, step, c.start, c.keys, c.lr, c.memory) for c in contexts]
            for view, context in zip(views, contexts, strict=True):
                objective = objective + sum(term.penalty(view, context) for term in method.objective)
        optimiser.zero_grad(set_to_none=True)  # what has no gradient, the optimiser leaves alone
        objective.backward()
        optimiser.step()
        if method.objective:
            with torch.no_grad():
                for view, context in zip(S.unstack(params) if grouped else [params], contexts, strict=True):
                    for term in method.objective:
                        term.prox_(view, context)
        total += losses.detach()
    params = {name: value.detach() for name, value in params.items()}
    ends = [S.clone(view) for view in S.unstack(params)] if grouped else [params]
    return ends, (total / budget.steps).tolist()
