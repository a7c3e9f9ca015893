"""AS-LoRA's server: the mean of what moved, and for every layer a drawn choice of what moves next.

P(A moves) = sigmoid((S_A - S_B) / ((|S_A| + |S_B|) tau)), S a running mean of the clients' scores of that factor,
renewed only when it was the one that moved; tau falls from 1 to 0.1. The first `warmup` rounds move B, A, B, A, …
The control has P = 1/2 and the same draws: layers are as free, and no score decides.

Choices travel as "~mode/<layer>", scores come as "~score/<layer>", the server's memory stands under "~~as/…".
Kim et al. 2026; chapter 18.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedlora_mini import state as S
from fedlora_mini.accepted import ranges
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.exchange import OWN, Update, is_model
from fedlora_mini.federation.sampling import generator
from fedlora_mini.federation.schedule import MODE
from fedlora_mini.state import State

CHOICES = ("score", "coin")
SCORE = "~score/"
ROUND = f"{OWN}as/round"


def probability(a: float, b: float, tau: float) -> float:
    """P(A moves) for the scores of A and B; 1/2 where both are zero."""
    size = abs(a) + abs(b)
    return 0.5 if size == 0 else float(torch.sigmoid(torch.tensor((a - b) / (size * tau), dtype=torch.float64)))


@dataclass(frozen=True)
class Selection:
    """warmup: rounds of plain alternation, an even number, None = a tenth of the run's; memory: share of the old score.

    choice: what decides after the warm-up, "score" or, as a control, a fair "coin".
    A warm-up has at least two rounds, or A had no score; by itself, without a run's length, the rule takes two.
    """

    warmup: int | None = None
    memory: float = 0.9
    cooling: float = 0.95
    coldest: float = 0.1
    seed: int = 0
    choice: str = "score"

    @property
    def label(self) -> str:
        return f"mean, and a choice by {self.choice}"

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise unknown("choice of AS-LoRA", self.choice, CHOICES)
        if self.warmup is not None and (self.warmup < 2 or self.warmup % 2):
            raise FedloraError(f"warmup must be an even number of rounds, at least 2, got {self.warmup}")
        ranges(self, memory="[0, 1]", cooling="[0, 1]", coldest="(0, 1]")

    def within(self, rounds: int) -> "Selection":
        """The rule for a run of so many rounds."""
        return self if self.warmup is not None else replace(self, warmup=max(2, 2 * round(rounds / 20)))

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        warmup = self.warmup or 2
        told = S.weighted_mean((update.state, update.weight) for update in updates)
        out, scores = S.pick(told, is_model), S.pick(told, lambda name: name.startswith(SCORE))
        round = int(server[ROUND]) + 1 if ROUND in server else 1
        rng, tau = generator(self.seed, round, "modes"), max(self.coldest, self.cooling ** (round + 1 - warmup))
        for name in sorted(scores):
            path, score = name.removeprefix(SCORE), float(scores[name])
            moved = "A" if bool(server.get(f"{MODE}{path}", 0)) else "B"
            past = server.get(f"{OWN}as/{moved}/{path}")
            mixed = score if past is None else self.memory * float(past) + (1 - self.memory) * score
            out[f"{OWN}as/{moved}/{path}"] = torch.tensor(mixed, dtype=torch.float64)
            known = {f: float(server.get(f"{OWN}as/{f}/{path}", 0.0)) for f in "AB"} | {moved: mixed}
            draw = float(torch.rand((), generator=rng, dtype=torch.float64))
            free = 0.5 if self.choice == "coin" else probability(known["A"], known["B"], tau)
            out[f"{MODE}{path}"] = torch.tensor(float(draw < (float(round % 2) if round < warmup else free)))
        out[ROUND] = torch.tensor(round)
        return out
