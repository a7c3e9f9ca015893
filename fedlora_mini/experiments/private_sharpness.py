"""λ_max and the factors' coupling, at equal training loss: a run that has learnt less is flatter for that reason alone.

Arms of one seed are trained again, round by round; L* is the lowest training loss that all of them reach, and each is
looked at in the two rounds between which its loss first passes L*: a number is that of the line between them, at L*.
Factors are balanced first, since (B / c, c A) is the same model. All of this reads clients' images without noise: it is
a measurement, and no part of a private run. Chapter 17.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from fedlora_mini.adapters.base import call
from fedlora_mini.data.base import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import arm_of
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.private import AS
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.experiments.report import Result
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.sampling import generator
from fedlora_mini.losses import task_loss
from fedlora_mini.metrics import balanced, couplings, lambda_max
from fedlora_mini.privacy import Seeded
from fedlora_mini.state import State, clone, pick

SCHEDULES = ("la_lora", "fedit", "fedit@half", "ffa", "rolora", "la_lora:first=A", AS)
LOOKED = (*SCHEDULES, *(f"{arm}:filter={name}" for arm in ("la_lora", "fedit") for name in ("low-pass", "rescaled")))
IMAGES = 256  # of all clients' training images, evenly spaced, for the curvature


@dataclass
class Traced:
    """A run whose every round is kept: the server's tensors and the training loss at them, before and after."""

    federation: Federation
    states: list[State]
    losses: list[float]

    @classmethod
    def of(cls, config: RunConfig) -> "Traced":
        """Train by the config, and look at the loss on all clients' training images before and after every round."""
        own = cls(Federation.build(config), [], [])
        own.keep()
        for _ in own.federation.rounds():
            own.keep()
        return own

    def keep(self) -> None:
        """Put down where the server stands."""
        self.states.append(clone(pick(self.federation.server.state, is_model)))
        self.losses.append(self.loss(self.states[-1]))

    @property
    def images(self) -> Split:
        return Split.concat([site.train for site in self.federation.data.sites])

    @torch.no_grad()
    def loss(self, state: State) -> float:
        """The mean over images."""
        own = self.images
        return float(task_loss(call(self.federation.model, state, own.images), own.masks).mean())

    def around(self, loss: float) -> list[tuple[int, float]]:
        """(rounds of training, their share): the two in a row between which the training loss first passes this one.

        Where the loss is this one, that one alone. Raises where the loss is on one side all along.
        """
        for t, (before, after) in enumerate(pairwise(self.losses)):
            if min(before, after) <= loss <= max(before, after):
                share = (loss - before) / (after - before) if after != before else 1.0
                return [(t + i, part) for i, part in enumerate((1 - share, share)) if part > 0]
        raise FedloraError(f"the training loss passes {loss:g} between no two rounds: {self.losses}")

    def looked_at(self, loss: float) -> dict[str, float]:
        """Sharpness and coupling on the line between these rounds, where the loss is `loss`."""
        found = [(share, self.sharpness(t) | self.coupling(t)) for t, share in self.around(loss)]
        return {name: sum(share * told[name] for share, told in found) for name in found[0][1]}

    def sharpness(self, round: int) -> dict[str, float]:
        """log λ_max in all trained tensors after that round, with the loss there."""
        own, model = self.images, self.federation.model
        rows = torch.linspace(0, len(own) - 1, min(IMAGES, len(own))).long()
        state = balanced(self.states[round])
        rng = generator(self.federation.config.seed, "sharpness")
        found = lambda_max(model, state, task_loss, own.images[rows], own.masks[rows], rng, most=20, tolerance=1e-2)
        return {"log_lambda_max": math.log(max(found.value, 1e-12)), "loss": self.losses[round], "round": round}

    def coupling(self, round: int) -> dict[str, float]:
        """Mean over layers of cos(∇_B A, B ∇_A) after that round: of the exact gradient, and of one private one.

        The private one is a client's, mean over clients, both factors released in one step whatever the arm moves.
        """
        model, state, config = self.federation.model, self.states[round], self.federation.config
        own = self.images
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        loss = task_loss(call(model, leaves, own.images), own.masks).mean()
        exact = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))
        guard, told = self.federation.engine.setting.guard, {"cos": _mean(couplings(state, exact).values())}
        if guard is not None:
            cosines: list[float] = []
            for k, site in enumerate(self.federation.data.sites):
                rng, data = generator(config.seed, round, k, "coupling"), site.train
                drawn = torch.rand(len(data), generator=rng) < guard.mechanism.q
                batch = data.images[drawn], data.masks[drawn]
                g = guard.mechanism.gradient(model, state, task_loss, *batch, len(data), Seeded(rng))
                cosines += couplings(state, g).values()
            told["cos_released"] = _mean(cosines)
        return told


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def compare(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """One record an arm, all of one seed, in the form of a stored run: the numbers stand under "server"."""
    torch.set_num_threads(configs[0].threads or 1)
    started = perf_counter()
    traced = [Traced.of(config) for config in configs]
    common = max(min(each.losses) for each in traced)
    records = []
    for each in traced:
        told = each.looked_at(common)
        records.append(
            {
                "event": "result",
                "config": each.federation.config.asdict(),
                "versions": versions(),
                "machine": machine(torch.device("cpu")),
                "scores": {"server": {"model": told | {"common_loss": common}}},
                "losses": each.losses,
                **each.federation.promise.told(each.federation.server.round),
                "seconds": perf_counter() - started,
            }
        )
    return records


def study(parts: Mapping[str, Sequence[Result]], arms: Sequence[str] = LOOKED) -> dict[str, list[dict[str, Any]]]:
    """Part -> records of these arms, ARM or ARM@PART, else of part main: all arms of a seed at one training loss.

    Each has the rate that its search had found.
    """
    named = [(arm, part or "main") for arm, _, part in (text.partition("@") for text in arms)]
    found = {
        (part, arm_of(r["config"]), r["config"]["seed"]): RunConfig(**r["config"])
        for part in {part for _, part in named}
        for r in parts[part]
    }
    out: dict[str, list[dict[str, Any]]] = {part: [] for _, part in named}
    for seed in sorted({seed for *_, seed in found}):
        records = compare([found[part, arm, seed] for arm, part in named])
        for (_, part), record in zip(named, records, strict=True):
            out[part].append(record)
    return out
