"""A client: one site's data, its memory between rounds, and how it answers the server."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Adapter, Key, adapters
from fedlora_mini.data.base import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.client import Batches, Budget, train
from fedlora_mini.federation.exchange import Request, Update, is_model, is_note
from fedlora_mini.federation.fold import fold, fresh, products_in
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.row import Method, Work
from fedlora_mini.federation.sampling import batch_indices, drawing, flips, generator
from fedlora_mini.privacy.dpsgd import Guarded
from fedlora_mini.privacy.ledger import Ledger
from fedlora_mini.privacy.sampling import poisson
from fedlora_mini.state import State


@dataclass
class Setting:
    """What all clients of a run have in common. `model` is prepared for the method's adapter.

    Raises for a method that names factors which the adapter does not have.
    """

    model: nn.Module
    method: Method
    keys: Mapping[str, Key]
    budget: Budget
    seed: int = 0
    precision: str = "float32"
    guard: Guarding | None = None  # makes private every gradient that a client follows
    layers: dict[str, Adapter] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = dict(adapters(self.model))
        if told := self.method.misnames(self.keys):
            raise FedloraError(told)

    def private(self, name: str) -> bool:
        """Whether a tensor never leaves its client. Notes don't count as tensors: each says itself where it goes."""
        return name in self.keys and not self.method.shared(self.keys[name])


@dataclass
class Member:
    """`memory` holds its copy of every trained tensor and its notes; only `private` ones differ from the server's.

    ledger: what its gradients have cost its images, under privacy.
    """

    number: int
    data: Split
    memory: State
    setting: Setting
    ledger: Ledger | None = field(init=False)
    noised: set[tuple[int, str]] = field(default_factory=set)  # rounds and purposes whose noise is used up

    def __post_init__(self) -> None:
        self.ledger = None if self.setting.guard is None else self.setting.guard.ledger()

    @property
    def tensors(self) -> State:
        """Its copy of the model's tensors."""
        return S.pick(self.memory, is_model)

    @property
    def notes(self) -> State:
        return S.pick(self.memory, is_note)

    def own(self, state: State) -> State:
        """The private part of a state."""
        return S.pick(state, self.setting.private)

    @property
    def personal_part(self) -> State:
        """What makes its own model of the server's: private tensors, and the notes that the row's model needs."""
        return self.own(self.memory) | S.pick(self.notes, lambda n: n.startswith(self.setting.method.personal_notes))

    def keep(self, prefix: str, state: State) -> None:
        """Remember a state under `<prefix><name>`; what stood there is forgotten."""
        kept = {name: value for name, value in self.memory.items() if not name.startswith(prefix)}
        self.memory = kept | {f"{prefix}{name}": value for name, value in state.items()}

    def recall(self, prefix: str) -> State:
        """What was kept under it; empty if nothing was."""
        return {n.removeprefix(prefix): value for n, value in self.memory.items() if n.startswith(prefix)}

    def receive(self, request: Request) -> None:
        """Take in the server's news: shared tensors, notes, and products that belong into frozen weights."""
        products = products_in(request.state)
        news = {name: value for name, value in request.state.items() if name not in products}
        self.memory = self.memory | news | fold(self.memory, products, self.setting.layers)
        rule: Any = self.setting.method.rule
        if getattr(rule, "fresh", False) and request.round > 1:
            self.memory = self.memory | fresh(self.memory, request.round, self.setting.layers, rule.seed)

    def batches(self, round: int, budget: Budget, purpose: str = "batches") -> Batches:
        """Its images for one round: step -> (b, C, *S), (b, *S); drawn by (seed, round, client, purpose).

        Under privacy every step is a Poisson sample, of any size; where that is secure, another one at every call.
        """
        seeded, guard, n = generator(self.setting.seed, round, self.number, purpose), self.setting.guard, len(self.data)
        rng = seeded if guard is None else guard.coins(seeded)
        if guard is None:
            index = batch_indices(n, budget.batch, budget.steps, seeded)

        def draw(step: int) -> tuple[Tensor, Tensor]:
            rows = index[step - 1] if guard is None else poisson(n, guard.mechanism.q, rng)
            rows = rows.to(self.data.images.device)
            x, y = self.data.images[rows], self.data.masks[rows]
            return flips(x, y, rng) if budget.augment else (x, y)

        return draw

    def fit(
        self,
        round: int,
        start: State | None = None,
        purpose: str = "batches",
        budget: Budget | None = None,
        **row: Any,
    ) -> tuple[State, float]:
        """Train from `start` (its own tensors) by the method's row, or the row with other cells (`objective=…`).

        budget: in the place of the run's.
        """
        own = self.setting
        budget = (own.budget if budget is None else budget).of(len(self.data))
        method = replace(own.method, **row) if row else own.method
        if own.guard is not None and own.guard.budget < math.inf:
            own.guard.check(method)  # also of the terms that a work adds
        begin = self.tensors if start is None else start
        batches = self.batches(round, budget, purpose)
        args = (own.model, method, own.keys, [begin], batches, budget, round, own.precision)
        guard = self.guarded(round, budget, purpose)
        with drawing(self.data.images.device, own.seed, round, self.number, f"layers in {purpose}"):
            [end], [loss] = train(*args, kept=[self.notes], guard=guard)
        return end, loss

    def guarded(self, round: int, budget: Budget, purpose: str) -> Guarded | None:
        """Write the round's releases down, then hand out what makes them private. Raises BudgetSpent.

        Seeded noise serves once: of two releases with the same noise the difference is bare, and is refused.
        """
        guard = self.setting.guard
        if guard is None or self.ledger is None:
            return None
        if (round, purpose) in self.noised and not guard.secure:
            raise FedloraError(
                f"client {self.number} has released gradients of round {round} for '{purpose}' already, and would now "
                "add the same noise to others: another release needs another purpose"
            )
        self.ledger.spend(guard.releases(budget.steps))
        self.noised.add((round, purpose))
        source = guard.source(generator(self.setting.seed, round, self.number, f"noise of {purpose}"))
        return Guarded(guard.mechanism, len(self.data), source)

    def answer(self, request: Request) -> Update:
        """One round: receive, work, keep the private part, hand out what travels."""
        self.receive(request)
        known = dict(self.memory)
        end, loss, messages = done(self.setting.method.work, self.setting.method.work.round(self, request.round))
        if broken := not (S.finite(end) and S.finite(self.memory)):
            self.memory = known  # a work's notes, like private tensors, are not replaced by broken ones
        update = self.close(end, loss, request.round, messages)
        return replace(update, broken=broken)

    def close(self, end: State, loss: float, round: int, messages: State | None = None) -> Update:
        """Keep the private part, unless training broke; hand out the shared tensors that moved, and the messages."""
        broken = not S.finite(end)
        if not broken:
            self.memory |= self.own(end)
        setting, steps = self.setting, self.setting.budget.steps  # the run's: all clients send the same names
        moves, keys, private = setting.method.schedule.moves, setting.keys, setting.private
        sent = {
            n: v for n, v in end.items() if n in keys and not private(n) and moves(keys[n], round, steps, self.notes)
        }
        taken = setting.budget.of(len(self.data)).steps
        return Update(self.number, sent | (messages or {}), float(len(self.data)), loss, taken, broken)


def done(work: Work, returned: Any) -> tuple[State, float, State]:
    """What the work's round returned. Raises, with its name, unless it is what a round returns."""
    kinds = (Mapping, Real, Mapping)
    if isinstance(returned, tuple) and len(returned) == 3 and all(map(isinstance, returned, kinds)):
        return returned
    got = f"({', '.join(type(each).__name__ for each in returned)})" if isinstance(returned, tuple) else repr(returned)
    raise FedloraError(
        f"work '{work.label or type(work).__name__}' returned {got} from its round; a round returns a tuple of three: "
        "the trained tensors by name, the mean loss as a number, the messages by name"
    )


def on(device: torch.device, split: Split) -> Split:
    """The split with its tensors there."""
    return Split(split.images.to(device), split.masks.to(device))
