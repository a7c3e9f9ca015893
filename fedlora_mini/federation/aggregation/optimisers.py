"""θ <- θ + lr · step(Δ), Δ = rule(updates) - θ: the server takes the round's change as a gradient. Reddi et al. 2021.

The server's memory stands in its state under "~~m/<name>" and "~~v/<name>", and never travels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora_mini.accepted import ranges
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.exchange import OWN, Rule, Update, is_note
from fedlora_mini.state import State


def changes(server: State, goal: State) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, θ, Δ) in float64 of everything that takes a step."""
    for name in [name for name in goal if not stays(name)]:
        if name not in server:
            raise FedloraError(f"a server optimiser steps on what the server has; the rule inside returned '{name}'")
        now = server[name].double()
        yield name, now, goal[name].double() - now


def stays(name: str) -> bool:
    """Notes, and the running statistics of norms: a step beyond their mean could make a variance negative."""
    return is_note(name) or name.rpartition(".")[2].startswith("running_")


def memory(server: State, name: str, like: Tensor, start: float = 0.0) -> Tensor:
    """The remembered tensor in float64, or the start of one."""
    return server[name].double() if name in server else torch.full_like(like, start)


@dataclass(frozen=True)
class FedAvgM:
    """m <- β m + Δ, θ <- θ + lr m. Hsu et al. 2019. lr = 1, β = 0 is the rule inside.

    nesterov: θ <- θ + lr (Δ + β m), with the new m.
    """

    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    inner: Rule = mean
    label: ClassVar[str] = "server momentum"

    def __post_init__(self) -> None:
        ranges(self, lr="(0, inf)", momentum="[0, 1)")

    @property
    def unequal(self) -> bool:
        return getattr(self.inner, "unequal", False)

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        out = self.inner(server, updates)
        for name, now, change in list(changes(server, out)):
            m = self.momentum * memory(server, f"{OWN}m/{name}", now) + change
            ahead = change + self.momentum * m if self.nesterov else m
            step = {name: now + self.lr * ahead, f"{OWN}m/{name}": m}
            out |= {key: value.to(server[name].dtype) for key, value in step.items()}
        return out


@dataclass(frozen=True)
class FedAdam:
    """m <- β1 m + (1 - β1) Δ, v <- β2 v + (1 - β2) Δ², θ <- θ + lr m / (√v + τ). Reddi et al. 2021, Algorithm 2.

    No bias correction; m starts at 0 and v at τ².
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    inner: Rule = mean
    label: ClassVar[str] = "server Adam"

    def __post_init__(self) -> None:
        ranges(self, lr="(0, inf)", beta1="[0, 1)", beta2="[0, 1)", tau="(0, inf)")

    @property
    def unequal(self) -> bool:
        return getattr(self.inner, "unequal", False)

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        out = self.inner(server, updates)
        for name, now, change in list(changes(server, out)):
            m = self.beta1 * memory(server, f"{OWN}m/{name}", now) + (1 - self.beta1) * change
            v = self.beta2 * memory(server, f"{OWN}v/{name}", now, self.tau**2) + (1 - self.beta2) * change.square()
            step = {name: now + self.lr * m / (v.sqrt() + self.tau), f"{OWN}m/{name}": m, f"{OWN}v/{name}": v}
            out |= {key: value.to(server[name].dtype) for key, value in step.items()}
        return out
