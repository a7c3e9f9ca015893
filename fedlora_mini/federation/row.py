"""A federated method is a row: a choice along the axes adapter, sharing, schedule, rule, objective, work, clients."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from torch import Tensor

from fedlora_mini.accepted import fitting
from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.registry import ADAPTERS, BODY
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.exchange import Rule
from fedlora_mini.federation.schedule import Schedule, together
from fedlora_mini.federation.sharing import Sharing, nothing
from fedlora_mini.privacy.filters import AXES, FILTERS, SPATIAL
from fedlora_mini.regularizers import Regularizer
from fedlora_mini.state import State

if TYPE_CHECKING:
    from fedlora_mini.federation.member import Member


class Work:
    """What a client does in a round, and what it says beside its shared tensors. By default: it trains, and no more.

    A note is a tensor whose name holds a "~". messages: patterns (`fnmatch`) of those that it sends, which engines and
    server check; notes: how the names of those that it keeps begin; personal_notes: the same of those among them that
    `personal` reads, without which a client has lost its model. A work of its own is never done in one pass.
    """

    label: str = ""
    messages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    personal_notes: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        """Whether it reads images in `fit` alone, so that private gradients make it private. A work says so itself."""
        return type(self) is Work

    def round(self, client: "Member", round: int) -> tuple[State, float, State]:
        """The trained tensors, the mean loss and the messages."""
        end, loss = client.fit(round)
        return end, loss, {}

    def personal(self, state: State, client: "Member") -> State:
        """The client's own model, given the shared tensors with its private ones."""
        return state

    def newcomer(self, state: State, clients: Sequence["Member"], images: Tensor) -> State:
        """The model for a site that never trained, given the common one and the site's unlabelled images."""
        return state

    def look(self, state: State, client: "Member") -> dict[str, float]:
        """What a finished run's record says of this client under the protocol "work", given its own model."""
        return {}


trains = Work()
MANY = 8  # local steps with which every schedule has moved all that it moves
CALLED = {  # cell of a row -> how many arguments it takes, and what it may be
    "shared": (1, "a function Key -> bool or a Sharing"),
    "schedule": (4, "a function (Key, round, step, steps) -> bool or a Schedule"),
    "rule": (2, "a function (server, updates) -> tensors by name, or an instance such as Stack()"),
}


def _takes(cell: Any, arguments: int) -> bool:
    """Whether it can be called with so many; a class, which would be called to make an instance, counts as none."""
    try:
        inspect.signature(cell).bind(*range(arguments))
    except TypeError:
        return False
    return not isinstance(cell, type)


@dataclass(frozen=True)
class Method:
    """One row. `pooled` is the client axis: one client that holds all sites' data instead of one client per site.

    Plain functions may be given for `shared` and `schedule`.
    """

    title: str
    adapter: str  # a row of `adapters.registry.ADAPTERS`
    shared: Sharing
    schedule: Schedule = together
    rule: Rule = mean
    objective: tuple[Regularizer, ...] = ()
    work: Work = trains
    pooled: bool = False
    reference: str = ""  # citation key of the book

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise unknown("adapter", self.adapter, ADAPTERS)
        for name, (arguments, wanted) in CALLED.items():
            if not _takes(cell := getattr(self, name), arguments):
                raise FedloraError(f"'{self.title}': {name} is {wanted}, got {cell!r}")
        for name, named in (("shared", Sharing), ("schedule", Schedule)):
            if not isinstance(getattr(self, name), named):
                object.__setattr__(self, name, named("what its own function says", getattr(self, name)))
        for name, kind in (("objective", Regularizer), ("work", Work)):
            parts = getattr(self, name) if name == "objective" else (getattr(self, name),)
            if not isinstance(parts, tuple) or not all(isinstance(part, kind) for part in parts):
                wanted = "a tuple of terms, such as (SOR(),)" if name == "objective" else "a Work, such as Ditto()"
                raise FedloraError(f"'{self.title}': {name} is {wanted}, got {getattr(self, name)!r}")

    def images(self, x: Tensor, notes: Mapping[str, Tensor]) -> Tensor:
        """What the network is given for images x, by a client's or the server's notes."""
        for term in self.objective:
            x = term.images(x, notes)
        return x

    @property
    def personal_notes(self) -> tuple[str, ...]:
        """How the names of the notes begin that a client's own model cannot do without."""
        return (*self.work.personal_notes, *(name for term in self.objective for name in term.reads))

    def keeps_nothing(self, keys: Mapping[str, Key], model: str) -> str:
        """What to say where something stays at the sites by the row's words, and nothing does of this network."""
        if not self.shared.needs or not all(map(self.shared, keys.values())):
            return ""
        return (
            f"'{self.title}' shares {self.shared.label}, and of model '{model}' that is everything: nothing would stay "
            f"at a site; it needs a network that has {self.shared.needs}, such as unet_bn"
        )

    def sends_nothing(self, keys: Mapping[str, Key]) -> str:
        """What to say where something should travel by the row's words, and nothing does of this network."""
        if self.shared == nothing or any(map(self.shared, keys.values())):
            return ""
        there = ", ".join(sorted({key.factor for key in keys.values()}))
        return (
            f"'{self.title}' shares {self.shared.label}, and of adapter '{self.adapter}' that is nothing: no client "
            f"would send a number; its factors: {there}. If nothing is meant, share `sharing.nothing`"
        )

    def misnames(self, keys: Mapping[str, Key]) -> str:
        """What to say where sharing or schedule names a factor that no layer of its region has."""
        there: dict[str, set[str]] = {}
        for key in keys.values():
            there.setdefault(key.region, set()).add(key.factor)
        named = [(f"shares {self.shared.label}", *pair) for pair in self.shared.named]
        turns = [(region, factor) for factor in self.schedule.named for region in BODY]
        named += [(f"has the schedule '{self.schedule.label}'", *pair) for pair in turns]
        for what, region, factor in named:
            if region in there and factor not in there[region]:
                return (
                    f"'{self.title}' {what}, and adapter '{self.adapter}' has no factor '{factor}' in the {region}; "
                    f"its factors there: {', '.join(sorted(there[region]))}"
                )
        return ""

    def rests(self, keys: Mapping[str, Key], steps: int) -> str:
        """What to say where the schedule would move one of these tensors, and so few local steps never do."""
        moved = {n: {name for name, k in keys.items() if self.schedule.may_move(k, 2, n)} for n in range(1, MANY + 1)}
        if steps >= MANY or not (left := moved[MANY] - moved[steps]):
            return ""
        least = min(n for n, names in moved.items() if left <= names)
        return (
            f"'{self.title}' moves '{min(left)}' late in a round ({self.schedule.label}): a client that takes {steps} "
            f"local step{'s' * (steps > 1)} would never train it; at least {least} are needed"
        )

    def filters_nothing(self, keys: Mapping[str, Key]) -> str:
        """What to say where gradients of factors are filtered, and the row trains none."""
        found = [term.label for term in self.objective if isinstance(term, SPATIAL)]
        if not found or any(key.factor in AXES for key in keys.values()):
            return ""
        return f"'{self.title}' trains no low-rank factor, which is what the {found[0]} acts on; leave out 'filter'"

    def but(self, **changes: Any) -> "Method":
        """The row with other numbers in its rule, objective and work: `but(lam=0.1)`. Raises if no part has it.

        Every row takes `filter`, a name of `privacy.filters.FILTERS`: it replaces the row's own filters. A row whose
        factors take turns takes `first`, "A" or "B".
        """
        if "first" in changes:
            return replace(self, schedule=self.schedule.beginning(changes.pop("first"))).but(**changes)
        if "filter" in changes:
            return self._filtered(changes.pop("filter")).but(**changes)
        parts: list[Any] = [self.rule, *self.objective, self.work]
        for name, value in changes.items():
            having = [is_dataclass(part) and name in {f.name for f in fields(part)} for part in parts]
            if not any(having):
                known = [f.name for part in parts if is_dataclass(part) for f in fields(part)]
                raise unknown(f"setting of '{self.title}'", name, known)
            for i, part in enumerate(parts):
                if having[i]:
                    kind = get_type_hints(type(part))[name]
                    parts[i] = replace(part, **{name: fitting(f"setting '{name}' of '{self.title}'", value, kind)})
        return replace(self, rule=parts[0], objective=tuple(parts[1:-1]), work=parts[-1])

    def seeded(self, seed: int) -> "Method":
        """The row whose rule, objective and work draw by this seed; the row itself if none of them draws."""
        parts: list[Any] = [self.rule, *self.objective, self.work]
        draws = any(is_dataclass(part) and "seed" in {f.name for f in fields(part)} for part in parts)
        return self.but(seed=seed) if draws else self

    def lasting(self, rounds: int) -> "Method":
        """The row whose rule and work fit a run of so many rounds; the row itself if neither asks."""
        asking = {cell: getattr(getattr(self, cell), "within", None) for cell in ("rule", "work")}
        fitting = {cell: within(rounds) for cell, within in asking.items() if within is not None}
        return replace(self, **fitting) if fitting else self

    def _filtered(self, name: str) -> "Method":
        if name not in FILTERS:
            raise unknown("filter", name, FILTERS)
        kinds = tuple({type(term) for terms in FILTERS.values() for term in terms})
        others = tuple(term for term in self.objective if not isinstance(term, kinds))
        return replace(self, objective=others + FILTERS[name])
