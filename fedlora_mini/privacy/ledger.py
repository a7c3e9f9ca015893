"""What a client has released so far, and the rule that it never releases more than it may.

A ledger is asked before a release, not after it. It is part of a checkpoint: forgetting it would be the cheapest way to
break the promise. Chapter 14.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy.accountant import Release, epsilon


class BudgetSpent(FedloraError):
    """One more release would exceed the budget."""


@dataclass
class Ledger:
    """(epsilon, delta) that may be spent, and the releases that were made. epsilon = inf only counts."""

    budget: float = float("inf")
    delta: float = 1e-5
    method: str = "pld"
    releases: list[Release] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise FedloraError(f"the privacy budget epsilon must be positive, got {self.budget}")
        epsilon([], self.delta, self.method)  # raises for a bad delta or accountant

    def spent(self, more: Sequence[Release] = ()) -> float:
        """epsilon of all releases so far, and of `more`."""
        return epsilon([*self.releases, *more], self.delta, self.method)

    def spend(self, release: Release) -> None:
        """Write it down, before anything is released. Raises BudgetSpent, and then nothing may be released."""
        if self.budget < float("inf") and (total := self.spent([release])) > self.budget:
            raise BudgetSpent(
                f"{release.times} more release(s) would spend epsilon {total:.4g} of {self.budget:g} at delta "
                f"{self.delta:g}; {self.spent():.4g} is spent"
            )
        last = self.releases[-1] if self.releases else None
        if last and (last.sigma, last.q) == (release.sigma, release.q):
            self.releases[-1] = Release(last.sigma, last.q, last.times + release.times)
        else:
            self.releases.append(release)

    def asdict(self) -> dict[str, Any]:
        """For a checkpoint."""
        told = [[r.sigma, r.q, r.times] for r in self.releases]
        return {"budget": self.budget, "delta": self.delta, "method": self.method, "releases": told}

    @classmethod
    def fromdict(cls, saved: Mapping[str, Any]) -> "Ledger":
        """The ledger that was saved. Raises if a field is missing: an empty ledger would be a wrong one."""
        if missing := {"budget", "delta", "method", "releases"} - saved.keys():
            raise FedloraError(f"a saved ledger lacks {', '.join(sorted(missing))}")
        releases = [Release(float(s), float(q), int(times)) for s, q, times in saved["releases"]]
        return cls(float(saved["budget"]), float(saved["delta"]), str(saved["method"]), releases)
