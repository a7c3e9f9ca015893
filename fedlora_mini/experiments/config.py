"""Everything that determines a run, in one frozen record; its hash names the run's folder."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args, get_type_hints

from fedlora_mini.accepted import fitting
from fedlora_mini.adapters.registry import ADAPTERS
from fedlora_mini.data.select import Choice
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.client import Budget
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.methods import METHODS, method
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sampling import drawn, participants
from fedlora_mini.privacy import DPSGD, Release, calibrate, epsilon

DEVICES = ("auto", "cpu", "cuda")  # no mps: means and digests are taken in float64, which it lacks
UNITS = ("image", "client")
PRECISIONS = ("auto", "float32", "bf16")
LARGEST_SIDE = 4096  # of an image, in pixels: what memory holds
WHOLE = {  # setting -> its least and largest number
    "seed": (0, 2**64 - 1),  # as far as torch's generators go
    "size": (8, LARGEST_SIDE),
    "rounds": (0, math.inf),
    "eval_every": (0, math.inf),
    "clients": (1, math.inf),
    "threads": (1, math.inf),
}
LARGEST_EPSILON = 1e4  # beyond it accountants overflow, and nothing is hidden


@dataclass(frozen=True)
class RunConfig:
    """One run. `lr=None` takes the adapter's default rate, "auto" precision is bf16 on CUDA and float32 elsewhere.

    Raises for a setting of another type than its own. A path becomes its text, a number of NumPy one of Python.
    """

    method: str = "fedit"
    data: str = "phantom"
    data_options: dict[str, Any] = field(default_factory=dict)
    sites: Choice = None  # comma-separated names, or how many of the first
    unseen: Choice = None  # comma-separated names of sites that never train; None = the data set's own
    whole_unseen: bool = False  # score these on all their images, and not on their test share alone
    size: int = 64
    dirichlet: float | None = None  # None = natural partition
    clients: int | None = None  # with dirichlet: number of clients; None = as many as sites
    model: str = "minisam"
    base: str = "auto"
    rank: int = 4
    ranks: list[int] = field(default_factory=list)  # by client, in a circle, where the rule takes unequal ranks
    alpha: float | None = None
    rounds: int = 10  # 0 = nothing is trained: the base under a new head
    steps: int = 10
    passes: float | None = None  # local steps by each client's data instead: so many times through it
    batch: int = 8
    lr: float | None = None
    optimiser: str = "adam"
    weight_decay: float = 0.0
    augment: bool = True
    fraction: float = 1.0
    seed: int = 0
    execution: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None  # None = torch's choice, written down in the result
    eval_every: int = 0  # 0 = only at the end
    leakage: bool = False  # measure in every round what shared factors tell of the sites
    epsilon: float | None = None  # what may be spent on any one `unit`; None = no such budget
    unit: str = "image"  # "image": clients follow private gradients; "client": the server adds up clipped changes
    sigma: float | None = None  # noise multiplier; None = with epsilon: the least that the accountant allows
    delta: float = 1e-5
    accountant: str = "pld"
    clip: float = 1.0  # C, the largest norm of one image's gradient, or of one client's change
    clipping: str = "flat"
    micro: int = 64  # images whose own gradients are held at once: memory and last bits, as with `threads`
    quantile: float | None = None  # with unit "client": C starts at `clip` and follows this quantile of the norms
    secure: bool = False  # noise and coins from the operating system, which no seed repeats
    change: dict[str, Any] = field(default_factory=dict)  # other numbers in the row, such as {"lam": 0.1}

    def __post_init__(self) -> None:
        self._check_types()
        adapter = ADAPTERS[self.row.adapter]
        if self.lr is None:
            object.__setattr__(self, "lr", adapter.lr)
        if self.device not in DEVICES:
            raise unknown("device", self.device, DEVICES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        self._check_numbers()
        if self.clients is not None and self.dirichlet is None:
            raise FedloraError("clients needs dirichlet: without it every site is one client")
        self.budget  # noqa: B018  raises for a bad one
        self.ranks_of(1, self.row)
        if self.unit not in UNITS:
            raise unknown("unit of privacy", self.unit, UNITS)
        if self.private:
            self._guarding(1.0 if self.sigma is None else self.sigma, 1.0)
            if self.leakage:
                raise FedloraError(
                    "leakage is read off gradients and changes without noise: leave it out under privacy"
                )

    def _check_types(self) -> None:
        """Every setting as its annotation wants it."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value) is float and float in (kind, *get_args(kind)):
                continue  # NaN and infinity too: they are refused with the interval
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            object.__setattr__(self, name, fitting(name, value, kind))
        object.__setattr__(self, "ranks", [fitting("each of the ranks", rank, int) for rank in self.ranks])

    def _check_numbers(self) -> None:
        """Raise for a number that no run can follow."""
        for name, (least, most) in WHOLE.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                told = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise FedloraError(f"{name} must be {told}, got {value}")
        for name in ("lr", "alpha", "passes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FedloraError(f"{name} must be positive and finite, got {value}")
        if not self.clip > 0:
            raise FedloraError(f"clip: the clipping norm C must be positive, got {self.clip}")
        if not self.data:
            raise FedloraError(
                "data is the name of a data set (see `fedlora data list`) or the path of a folder, got ''"
            )
        if self.dirichlet is not None and not 0 < self.dirichlet < math.inf:
            raise FedloraError(f"dirichlet must be positive and finite, got {self.dirichlet}")
        if self.sigma is not None and not self.sigma < math.inf:
            raise FedloraError(f"sigma must be finite, got {self.sigma}")
        if not 0 < self.fraction <= 1:
            raise FedloraError(f"the participation fraction must be in (0, 1], got {self.fraction}")
        if not 0 <= self.weight_decay < math.inf:
            raise FedloraError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.epsilon is not None and not 0 < self.epsilon <= LARGEST_EPSILON:
            raise FedloraError(f"epsilon must be positive and at most {LARGEST_EPSILON:g}, got {self.epsilon}")
        if self.epsilon is not None and self.sigma is None and self.rounds == 0:
            raise FedloraError("epsilon needs rounds of at least 1: a run without rounds spends nothing")

    @property
    def row(self) -> Method:
        """The method with this run's changes; what its rule draws follows the run's seed."""
        return method(self.method).seeded(self.seed).but(**self.change).lasting(self.rounds)

    def ranks_of(self, clients: int, row: Method) -> dict[int, int]:
        """Client -> its rank; empty if all have the model's."""
        if self.ranks and not getattr(row.rule, "unequal", False):
            able = ", ".join(name for name, each in METHODS.items() if getattr(each.rule, "unequal", False))
            raise FedloraError(f"'{self.method}' cannot combine unequal ranks, as {able} can; leave out 'ranks'")
        if self.ranks and not all(1 <= rank <= self.rank for rank in self.ranks):
            raise FedloraError(f"ranks are numbers from 1 to rank = {self.rank}, got {list(self.ranks)}")
        return {k: self.ranks[k % len(self.ranks)] for k in range(clients)} if self.ranks else {}

    @property
    def private(self) -> bool:
        """Whether every client's gradients are clipped and noised."""
        return self.epsilon is not None or self.sigma is not None

    def guard(self, q: float, steps: int) -> Guarding | None:
        """Privacy at sampling rate q for a client that takes so many steps in all; None if nothing was asked for."""
        return self._guarding(self.noise(q, steps), q) if self.private and self.unit == "image" else None

    def noise(self, q: float, steps: int) -> float:
        """The noise multiplier: the one that was given, or the least with which so many releases stay in the budget.

        Raises, before anything is trained, what the account of a given one would raise at the end.
        """
        if self.sigma is not None:
            epsilon([Release(self.sigma, q, steps)], self.delta, self.accountant)
            return self.sigma
        assert self.epsilon is not None
        return calibrate(self.epsilon, self.delta, q, steps, self.accountant)

    def chosen(self, clients: Sequence[int], round: int) -> list[int]:
        """Who takes part: a fixed number, or a Poisson sample where clients are what is protected.

        A secure sample is another one at every call.
        """
        if self.private and self.unit == "client":
            return drawn(clients, self.fraction, None if self.secure else self.seed, round)
        return participants(clients, self.fraction, self.seed, round)

    def _guarding(self, sigma: float, q: float) -> Guarding:
        budget = math.inf if self.epsilon is None else self.epsilon
        mechanism = DPSGD(sigma, q, self.clip, self.clipping, self.micro)
        guard = Guarding(mechanism, budget, self.delta, self.accountant, self.secure)
        guard.ledger()  # raises for a bad budget, delta or accountant
        if self.unit == "image":
            guard.check(self.row)
        if self.passes is not None:
            raise FedloraError("a privacy budget is planned in steps: leave out 'passes'")
        return guard

    @property
    def budget(self) -> Budget:
        assert self.lr is not None
        own = self
        return Budget(own.steps, own.batch, self.lr, own.optimiser, own.weight_decay, own.augment, passes=own.passes)

    def but(self, **changes: Any) -> "RunConfig":
        """A copy with changes."""
        known = self.__dataclass_fields__
        for name in changes:
            if name not in known:
                raise unknown("setting", name, known)
        return replace(self, **changes)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "RunConfig":
        """The config that a record holds. Raises for a setting that this version does not know."""
        return cls().but(**record)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def key(self) -> str:
        """Twelve hexadecimal digits that change with anything that can change the result."""
        return hashlib.sha256(json.dumps(self.asdict(), sort_keys=True).encode()).hexdigest()[:12]
