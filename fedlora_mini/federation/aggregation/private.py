"""θ <- θ + (sum_{k in S} clip_C(θ_k - θ) + σ C N(0, I)) / m: no client moves the model by much. McMahan et al. 2018.

S is a Poisson sample of the clients, m its expected size, and every client counts the same, however many images it has.
The rule's memory stands in the server's state under "~~dp/…" and never travels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.exchange import OWN, Update, is_model
from fedlora_mini.federation.sampling import generator
from fedlora_mini.privacy.clip import CLIPS, clip_sum, norms
from fedlora_mini.privacy.noise import Secure, Seeded, Source, add_noise
from fedlora_mini.state import State

ROUND, NORM = f"{OWN}dp/round", f"{OWN}dp/C"


@dataclass(frozen=True)
class ClientDP:
    """The mean of clipped changes with noise. sigma: noise multiplier of a round as a whole; clients: m.

    quantile: None keeps C; else C follows that quantile of the clients' norms, C <- C exp(-eta (b - quantile)) with b
    the noised share of clients that were not clipped. The count's noise has deviation m/20, and the sum's multiplier is
    raised to (sigma^-2 - (m/10)^-2)^-1/2, so that both together cost what sigma costs. Andrew et al. 2021, theorem 1.
    clipping: see `clip_sum`; a change that is not finite counts as 0. A quantile needs "flat", which has one norm.
    """

    sigma: float = 1.0
    clients: float = 4.0
    C: float = 0.1
    quantile: float | None = None
    eta: float = 0.2
    seed: int = 0
    secure: bool = False
    clipping: str = "flat"
    label: ClassVar[str] = "clipped changes, noise"
    empty: ClassVar[bool] = True  # a round in which nobody was drawn is one as well
    silent: ClassVar[bool] = True  # what is told beside the noised mean would tell of single clients

    def __post_init__(self) -> None:
        for name in ("clients", "C", "eta"):
            if not getattr(self, name) > 0:
                raise FedloraError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.sigma >= 0:
            raise FedloraError(f"the noise multiplier sigma must be at least 0, got {self.sigma}")
        if self.clipping not in CLIPS:
            raise unknown("way to clip", self.clipping, CLIPS)
        if self.quantile is not None and self.clipping != "flat":
            raise FedloraError(f"a quantile of the clients' norms needs clipping 'flat', got '{self.clipping}'")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise FedloraError(f"the quantile of the clients' norms must be in (0, 1), got {self.quantile}")
        if self.quantile is not None and self.sigma >= 2 * self.count_noise:
            raise FedloraError(
                f"with a quantile, sigma must be below {2 * self.count_noise:g} for {self.clients:g} clients a round: "
                "the noised count alone would cost more than the budget"
            )

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the number of clients that were not clipped."""
        return self.clients / 20

    @property
    def sum_sigma(self) -> float:
        """Noise multiplier of the sum of changes."""
        if self.quantile is None or self.sigma == 0:
            return self.sigma
        return float((self.sigma**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        round = int(server[ROUND]) + 1 if ROUND in server else 1
        C = float(server[NORM]) if NORM in server else self.C
        now = {name: value.double() for name, value in server.items() if is_model(name)}
        total, inside = S.scale(now, 0.0), 0.0
        for update in updates:
            change = {name: (update.state[name].double() - value)[None] for name, value in now.items()}  # one row
            inside += 0.5 if float(norms(change)) <= C else -0.5  # of sensitivity 1/2: nobody knows how many were drawn
            total = S.add(total, clip_sum(change, C, self.clipping))
        source: Source = Secure() if self.secure else Seeded(generator(self.seed, round, "server noise"))
        std = self.sum_sigma * C if self.sigma else 0.0  # C may be infinite without noise
        moved = S.add(now, add_noise(total, std, source), 1 / self.clients)
        out = {name: value.to(server[name].dtype) for name, value in moved.items()}
        out[ROUND] = torch.tensor(round)
        if self.quantile is not None:
            noise = self.count_noise * float(source.normal((1,), torch.float64)) if self.sigma else 0.0
            share = 0.5 + (inside + noise) / self.clients
            out[NORM] = torch.tensor(C * float(torch.tensor(-self.eta * (share - self.quantile)).exp()))
        return out
