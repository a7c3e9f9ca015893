"""Clients that train at once: their parameters, what their terms see of them, and the parts of a step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import call
from fedlora_mini.adapters.features import embed, statistic
from fedlora_mini.errors import FedloraError
from fedlora_mini.losses import task_loss
from fedlora_mini.privacy.dpsgd import Guarded, GuardedGroup
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.regularizers.base import EMPTY, Blind
from fedlora_mini.state import State


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """float32, or bf16 where matrix products are concerned."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def changes_images(term: Regularizer) -> bool:
    """Whether the network is given other images than the client's own."""
    return type(term).batch is not Regularizer.batch or type(term).images is not Regularizer.images


def penalty(term: Regularizer, state: State, context: Context) -> Tensor | float:
    """The term's own. Raises, with its name, unless it is one number."""
    value = term.penalty(state, context)
    if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise FedloraError(f"the penalty of '{term.label or type(term).__name__}' is {got}; it must be one number")
    return value


@dataclass
class Group:
    """K clients in one pass, or one; the methods are the parts of a step in their order."""

    model: nn.Module
    terms: Sequence[Regularizer]
    params: State  # what a step moves, and statistics that stay; with K > 1 stacked along the group axis
    contexts: list[Context]  # client by client, as they are at this step
    precision: str
    guard: Guarded | GuardedGroup | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        terms: Sequence[Regularizer],
        states: Sequence[State],
        context: Context,
        kept: Sequence[Mapping[str, Tensor]],
        precision: str,
        guard: Guarded | GuardedGroup | None,
    ) -> "Group":
        """At the start of a round: every client's context has its start, its place in the group and its notes."""

        def look(state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            """Another state's logits and z; norms in training mode write their statistics into copies."""
            return embed(model, {n: v.clone() if statistic(n) else v for n, v in state.items()}, x)

        grouped, context = len(states) > 1, replace(context, run=look)
        contexts = [replace(context, start=s, index=k if grouped else None, memory={}) for k, s in enumerate(states)]
        if kept:
            contexts = [replace(c, kept=notes) for c, notes in zip(contexts, kept, strict=True)]
        params = S.stack(states) if grouped else S.clone(states[0])
        return cls(model, terms, params, contexts, precision, guard)

    @property
    def grouped(self) -> bool:
        return len(self.contexts) > 1

    def views(self, stacked: State | None = None) -> list[State]:
        """The parameters, or tensors stacked as they are, client by client."""
        stacked = self.params if stacked is None else stacked
        return S.unstack(stacked) if self.grouped else [stacked]

    def begin(self, x: Tensor, y: Tensor, **step: Any) -> tuple[Tensor, Tensor]:
        """The batch as the terms want it, seen by every client's terms; `step`: what else is new in the contexts."""
        self.contexts = [replace(c, **step) for c in self.contexts]
        if self.terms and self.guard is None:
            x, y = self._prepared(x, y)
        if self.guard is None or not self.grouped:  # else nothing reads images but the mechanism
            K = len(self.contexts)
            parts = zip(self.contexts, x.chunk(K), y.chunk(K), strict=True)
            self.contexts = [replace(c, x=x_k, y=y_k) for c, x_k, y_k in parts]
        if not self.grouped:
            self.contexts = [replace(c, again=partial(self._again, x, y)) for c in self.contexts]
        return x, y

    def _prepared(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        K = len(self.contexts)
        parts = list(zip(x.chunk(K), y.chunk(K), strict=True))
        for k, context in enumerate(self.contexts):
            for term in self.terms:
                parts[k] = term.batch(*parts[k], context)
                parts[k] = term.images(parts[k][0], context.kept), parts[k][1]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k (L_k + penalties_k) in the terms' views of the parameters, and the L_k, which carry no gradient: (K,).

        Both are of the contexts as they are now.
        """
        K, seen = len(self.contexts), dict(self.params)
        features = any(term.features for term in self.terms)
        for term in self.terms:
            for view, context in zip(self.views(), self.contexts, strict=True):
                seen |= term.view(view, context)
        with autocast(x.device, self.precision):
            logits, z = embed(self.model, seen, x) if features else (call(self.model, seen, x), EMPTY)
        losses = task_loss(logits, y).view(K, -1).mean(1)  # (K,)
        value = losses.sum()
        if self.terms:
            own = z.chunk(K) if features else [z] * K
            for view, context, z_k in zip(self.views(), self.contexts, own, strict=True):
                context = replace(context, z=z_k)
                value = value + sum(penalty(term, view, context) for term in self.terms)
        return value, losses.detach()

    def _again(self, x: Tensor, y: Tensor) -> State:
        """The gradients on a batch at the parameters as they are now."""
        moving = {name: p for name, p in self.params.items() if p.requires_grad}
        with torch.enable_grad():
            value, _ = self.objective(x, y)
            found = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
        return {name: g for name, g in zip(moving, found, strict=True) if g is not None}

    def release_(self, x: Tensor, y: Tensor) -> None:
        """Leave the guard's private gradient in the parameters, and beside it the terms', which read no image."""
        assert self.guard is not None
        each = zip(self.views(), self.contexts, strict=True)
        seen = [(term, view, self._shown(term, context)) for view, context in each for term in self.terms]
        value = sum((penalty(term, view, context) for term, view, context in seen), 0.0)
        if isinstance(value, Tensor) and value.requires_grad:
            value.backward()
        fixed = {name: p.detach() for name, p in self.params.items()}
        with autocast(x.device, self.precision):
            gradient = self.guard.gradient(self.model, fixed, task_loss, x, y, self.contexts[0].moves)
        for name, g in gradient.items():
            own = self.params[name].grad
            self.params[name].grad = g if own is None else own + g

    @torch.no_grad()
    def change_gradients_(self) -> None:
        """Every term's `gradient_`, client by client; what a term took out loses its gradient."""
        gradient = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        if not gradient or not self.terms:
            return
        changed = [dict(view) for view in self.views(gradient)]
        for own, state, context in zip(changed, self.views(), self.contexts, strict=True):
            for term in self.terms:
                term.gradient_(own, state, self._shown(term, context))
        for name in gradient:
            left = [own[name] for own in changed if name in own]
            self.params[name].grad = None if not left else torch.stack(left) if self.grouped else left[0]

    @torch.no_grad()
    def proximal_steps_(self) -> set[str]:
        """Every term's `prox_`, client by client; the names whose moments the optimiser shall forget."""
        for view, context in zip(self.views(), self.contexts, strict=True) if self.terms else ():
            for term in self.terms:
                term.prox_(view, self._shown(term, context))
        return set().union(*(context.restart for context in self.contexts))

    def _shown(self, term: Regularizer, context: Context) -> Context:
        """What a term may look at. One that is not free is its work's own affair, which has no privacy budget then."""
        return Blind(context, term.label) if self.guard is not None and term.free else context

    def ends(self) -> list[State]:
        """The parameters without their graph, client by client, as tensors of their own."""
        views = self.views({name: value.detach() for name, value in self.params.items()})
        return [S.clone(view) for view in views] if self.grouped else views
