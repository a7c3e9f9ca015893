"""Which rows may run under a privacy budget, and what each client is given for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.privacy.accountant import Release
from fedlora_mini.privacy.dpsgd import DPSGD
from fedlora_mini.privacy.ledger import Ledger
from fedlora_mini.privacy.noise import Secure, Seeded, Source

if TYPE_CHECKING:
    from fedlora_mini.federation.row import Method


@dataclass(frozen=True)
class Guarding:
    """Example-level privacy of a run: every client follows gradients of `mechanism` and keeps a ledger of its own.

    budget: the epsilon that no client may exceed, at delta. secure: noise and coins from the operating system, not the
    seed.
    """

    mechanism: DPSGD
    budget: float = float("inf")
    delta: float = 1e-5
    accountant: str = "pld"
    secure: bool = False

    def ledger(self) -> Ledger:
        """An empty one."""
        return Ledger(self.budget, self.delta, self.accountant)

    def releases(self, steps: int) -> Release:
        """What so many steps release."""
        return Release(self.mechanism.sigma, self.mechanism.q, steps)

    def source(self, generator: torch.Generator) -> Source:
        """Where the noise of one client's round comes from."""
        return Secure() if self.secure else Seeded(generator)

    def coins(self, generator: torch.Generator) -> torch.Generator | None:
        """What draws one client's batches; None = the operating system."""
        return None if self.secure else generator

    def not_dp(self, method: "Method") -> str:
        """Why no epsilon holds for the row, whatever the noise; empty if one does."""
        why = f"'{method.title}' tells of its images by more than gradients: there is no privacy budget for it"
        return "" if method.work.free else why

    def check(self, method: "Method") -> None:
        """Raise unless everything that leaves a client is made of private gradients.

        Without a budget a work may tell more, and the record has epsilon = inf and why (`not_dp`). Terms never may read
        images: their gradients would not be clipped.
        """
        if self.budget < float("inf") and (why := self.not_dp(method)):
            raise FedloraError(why)
        if reads := [term.label for term in method.objective if not term.free]:
            raise FedloraError(f"'{method.title}': '{reads[0]}' reads images beside the private gradient")
