"""Local training: E steps on one client's data, or on several clients' at once along the group axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Adapter, Key, adapters, call
from fedlora_mini.adapters.features import embed, statistic
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.row import Method
from fedlora_mini.losses import task_loss
from fedlora_mini.privacy.dpsgd import Guarded, GuardedGroup
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.regularizers.base import EMPTY, Blind
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
    stop: Stop = lambda step, losses: False,
    kept: Sequence[Mapping[str, Tensor]] = (),
    guard: Guarded | GuardedGroup | None = None,
) -> tuple[list[State], list[float]]:
    """K start states -> K end states and K mean losses.

    With K > 1 the states are stacked and every factor carries a group axis of K; the loss is the sum of the clients'
    mean losses, so that no client's gradient sees another's data. The optimiser starts anew each round. `kept`: every
    client's notes, for the terms that read them. guard: what makes the clients' gradients private; then the loss is
    not told, batches may be empty and of unequal sizes, and terms that call themselves free see no image.
    """
    K, grouped, terms = len(states), len(states) > 1, method.objective
    if grouped and (alone := [term.label for term in terms if not term.grouped]):
        raise FedloraError(f"'{alone[0]}' needs clients one after the other: use execution 'sequential'")
    if guard is not None and (changing := [term.label for term in terms if _changes_images(term)]):
        raise FedloraError(f"'{changing[0]}' changes the images of a step: under privacy no term may")
    params = S.stack(states) if grouped else S.clone(states[0])
    layers, pace = dict(adapters(model)), PACES[budget.pace]
    movable = [name for name in params if name in keys and moves_at_all(keys[name], layers)]
    notes: Mapping[str, Tensor] = kept[0] if kept else {}  # what the server told is the same for all
    optimiser = OPTIMISERS[budget.optimiser]([params[name] for name in movable], budget)
    base = Context(round, 0, {}, dict(keys), budget.lr, budget.steps, layers=layers)
    contexts = _contexts(base, model, states, kept)
    total, done = torch.zeros(K, device=next(iter(params.values())).device), 0

    def views() -> list[State]:
        return S.unstack(params) if grouped else [params]

    def objective(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of the contexts as they are now: the sum over clients of task loss and penalties; the task losses (K,)."""
        return _objective(model, terms, params, views, contexts, (x, y), precision)

    for step in range(1, budget.steps + 1):
        for name in movable:
            params[name].requires_grad_(method.schedule(keys[name], round, step, budget.steps, notes))
        now = pace(step / budget.steps)
        optimiser.param_groups[0]["lr"] = budget.lr * now
        moves = frozenset(name for name in movable if params[name].requires_grad)
        fresh: dict[str, Any] = {"moves": moves, "step": step, "lr": budget.lr * now, "pace": now, "restart": set()}
        contexts = [replace(c, **fresh) for c in contexts]
        x, y = batches(step)
        apart = guard is None or not grouped  # else nothing reads images but the mechanism
        if terms and guard is None:
            x, y = _prepared(terms, contexts, x, y)

        def again(x: Tensor = x, y: Tensor = y) -> State:
            moving = {name: p for name, p in params.items() if p.requires_grad}
            with torch.enable_grad():
                value, _ = objective(x, y)
                found = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
                return {name: g for name, g in zip(moving, found, strict=True) if g is not None}

        if apart:
            parts = zip(contexts, x.chunk(K), y.chunk(K), strict=True)
            contexts = [replace(c, x=x_k, y=y_k) for c, x_k, y_k in parts]
        contexts = contexts if grouped else [replace(c, again=again) for c in contexts]
        optimiser.zero_grad(set_to_none=True)  # what has no gradient, the optimiser leaves alone
        if guard is None:
            value, losses = objective(x, y)
            value.backward()
        else:
            losses = torch.full_like(total, math.nan)
            _released(guard, model, params, views(), contexts, terms, (x, y), precision)
        if terms:
            _change_gradients(terms, params, contexts, grouped, guard is not None)
        optimiser.step()
        if terms:
            _proximal_steps(terms, views, contexts, guard is not None)
            for name in set().union(*(context.restart for context in contexts)):
                optimiser.state.pop(params[name], None)
        total, done = total + losses, done + 1
        if stop(step, losses.tolist()):
            break
    params = {name: value.detach() for name, value in params.items()}
    ends = [S.clone(view) for view in S.unstack(params)] if grouped else [params]
    return ends, (total / done).tolist()


def _contexts(
    base: Context, model: nn.Module, states: Sequence[State], kept: Sequence[Mapping[str, Tensor]]
) -> list[Context]:
    """What the terms may see of every client: its start, its place in the group, its notes, and the model."""

    def look(state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Another state's logits and z; norms in training mode write their statistics into copies."""
        return embed(model, {n: v.clone() if statistic(n) else v for n, v in state.items()}, x)

    grouped, base = len(states) > 1, replace(base, run=look)
    contexts = [replace(base, start=s, index=k if grouped else None, memory={}) for k, s in enumerate(states)]
    return [replace(c, kept=notes) for c, notes in zip(contexts, kept, strict=True)] if kept else contexts


def _changes_images(term: Regularizer) -> bool:
    return type(term).batch is not Regularizer.batch or type(term).images is not Regularizer.images


def _shown(term: Regularizer, context: Context, private: bool) -> Context:
    """What a term may look at. One that is not free is its work's own affair, which has no privacy budget then."""
    return Blind(context, term.label) if private and term.free else context


def _prepared(terms: Sequence[Regularizer], contexts: Sequence[Context], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The batch as the terms want it, client by client."""
    parts = list(zip(x.chunk(len(contexts)), y.chunk(len(contexts)), strict=True))
    for k, context in enumerate(contexts):
        for term in terms:
            parts[k] = term.batch(*parts[k], context)
            parts[k] = term.images(parts[k][0], context.kept), parts[k][1]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _objective(
    model: nn.Module,
    terms: Sequence[Regularizer],
    params: State,
    views: Callable[[], list[State]],
    contexts: Sequence[Context],
    batch: tuple[Tensor, Tensor],
    precision: str,
) -> tuple[Tensor, Tensor]:
    """sum_k (L_k + penalties_k) in the terms' views of the parameters, and the L_k, which carry no gradient: (K,)."""
    (x, y), K, seen = batch, len(contexts), dict(params)
    features = any(term.features for term in terms)
    for term in terms:
        for view, context in zip(views(), contexts, strict=True):
            seen |= term.view(view, context)
    with autocast(x.device, precision):
        logits, z = embed(model, seen, x) if features else (call(model, seen, x), EMPTY)
    losses = task_loss(logits, y).view(K, -1).mean(1)  # (K,)
    value = losses.sum()
    if terms:
        for view, context, z_k in zip(views(), contexts, z.chunk(K) if features else [z] * K, strict=True):
            context = replace(context, z=z_k)
            value = value + sum(term.penalty(view, context) for term in terms)
    return value, losses.detach()


@torch.no_grad()
def _proximal_steps(
    terms: Sequence[Regularizer], views: Callable[[], list[State]], contexts: Sequence[Context], private: bool
) -> None:
    """Every term's `prox_`, client by client."""
    for view, context in zip(views(), contexts, strict=True):
        for term in terms:
            term.prox_(view, _shown(term, context, private))


def _released(
    guard: Guarded | GuardedGroup,
    model: nn.Module,
    params: State,
    views: Sequence[State],
    contexts: Sequence[Context],
    terms: Sequence[Regularizer],
    batch: tuple[Tensor, Tensor],
    precision: str,
) -> None:
    """Leave the private gradient in `params`, and beside it those of the terms, which read no image."""
    seen = [(term, view, _shown(term, c, True)) for view, c in zip(views, contexts, strict=True) for term in terms]
    value = sum((term.penalty(view, context) for term, view, context in seen), 0.0)
    if isinstance(value, Tensor) and value.requires_grad:
        value.backward()
    fixed = {name: p.detach() for name, p in params.items()}
    with autocast(batch[0].device, precision):
        gradient = guard.gradient(model, fixed, task_loss, *batch, contexts[0].moves)
    for name, g in gradient.items():
        own = params[name].grad
        params[name].grad = g if own is None else own + g


@torch.no_grad()
def _change_gradients(
    terms: Sequence[Regularizer], params: State, contexts: list[Context], grouped: bool, private: bool
) -> None:
    """Every term's `gradient_`, client by client; what a term took out loses its gradient."""
    gradient = {name: p.grad for name, p in params.items() if p.grad is not None}
    if not gradient:
        return
    states = S.unstack(params) if grouped else [params]
    changed = [dict(view) for view in (S.unstack(gradient) if grouped else [gradient])]
    for own, state, context in zip(changed, states, contexts, strict=True):
        for term in terms:
            term.gradient_(own, state, _shown(term, context, private))
    for name in gradient:
        kept = [own[name] for own in changed if name in own]
        params[name].grad = None if not kept else torch.stack(kept) if grouped else kept[0]
