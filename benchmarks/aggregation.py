"""What do the server's rules cost: time and memory of a mean, of a best pair of low rank, and of every rule?"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Row, compare, main
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import LoRA, keys, prepare, trainable
from fedlora_mini.federation import METHODS, Request, Server, Update, federate
from fedlora_mini.federation.aggregation import (
    AggregationError,
    Fair,
    FedAdam,
    Krum,
    Stack,
    mean,
    median,
    padded,
    residual,
    svd,
)
from fedlora_mini.models import zoo
from fedlora_mini.state import State

CLIENTS, TENSORS, ENTRIES = 1000, 60, 8000  # 480 k parameters a client
SIDE, RANK = 250, 16  # of a layer: RANK * 2 SIDE = ENTRIES


def arriving() -> Iterator[Update]:
    """A client's update after the other, each in memory of its own."""
    base = {f"layer{i}.weight": torch.full((ENTRIES,), 1.0 + i) for i in range(TENSORS)}
    for k in range(CLIENTS):
        yield Update(k, S.clone(base), 1.0 + k)


def in_one_pass() -> State:
    return mean({}, arriving())


def held_and_stacked() -> State:
    updates = list(arriving())
    p = torch.tensor([u.weight for u in updates])
    return {n: torch.tensordot(p / p.sum(), v, 1) for n, v in S.stack([u.state for u in updates]).items()}


class Arriving:
    """An engine whose clients answer one by one, with what the server has plus 1 + k / 100."""

    def __init__(self, start: State) -> None:
        self.start, self.clients = start, list(range(CLIENTS))

    def exchange(self, requests: dict[int, Request]) -> Iterator[Update]:
        for k in requests:
            yield Update(k, {name: value + 1.0 + k / 100 for name, value in self.start.items()}, 1.0 + k)


def a_round(name: str, measured: bool = False) -> State:
    """One round of a method through `federate`, with its aggregation error or without."""
    layers = nn.Sequential(*(LoRA(nn.Linear(SIDE, SIDE), rank=RANK) for _ in range(TENSORS)))
    model = nn.ModuleDict({"encoder": layers})
    start = trainable(model)
    engine, server = Arriving(start), Server(start)

    def meter(before: State) -> AggregationError:
        return AggregationError(model, before, lambda name: False)

    args = (METHODS[name], engine, server, keys(model, list(start)), 1, 1, lambda t: engine.clients)
    [record] = federate(*args, meter=meter if measured else None)
    assert not record.refused and (record.agg_err is not None) == measured
    return server.state


MEANS: dict[str, Callable[[], State]] = {
    "held and stacked": held_and_stacked,
    "in one pass": in_one_pass,
    "a round of FedIT": partial(a_round, "fedit"),
    "a round of FedIT, with its aggregation error": partial(a_round, "fedit", measured=True),
    "a round of HetLoRA": partial(a_round, "hetlora"),
    "a round of FedNova": partial(a_round, "fednova"),
}


def peak(arm: str) -> float:
    """MB by which an arm raises the peak of a fresh process. (A child starts at its parent's: to be called first.)"""
    code = (
        f"import aggregation, resource; start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"aggregation.MEANS['{arm}'](); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    return int(out.stdout) / 1024


def means() -> list[Row]:
    arms = {f"{arm} (+{peak(arm):,.0f} MB)": act for arm, act in MEANS.items()}
    return compare(f"mean of {CLIENTS:,} clients, {TENSORS * ENTRIES:,} parameters", next(iter(arms)), arms, rounds=3)


def best_pairs() -> list[Row]:
    """FlexLoRA's rule for one layer, and the two ways through the m x n mean."""
    rows = []
    for m, n, K, r in ((192, 576, 8, 4), (768, 768, 8, 8), (1024, 1024, 20, 8)):
        rng = torch.Generator().manual_seed(0)
        start, *states = (
            {"l.A": torch.randn(r, n, generator=rng), "l.B": torch.randn(m, r, generator=rng)} for _ in range(K + 1)
        )
        updates = [Update(k, state, 1.0) for k, state in enumerate(states)]

        def whole(states: list[State] = states) -> torch.Tensor:
            return sum(s["l.B"] @ s["l.A"] for s in states) / len(states)

        arms: dict[str, Callable[[], Any]] = {
            "SVD of the m x n mean": lambda whole=whole: torch.linalg.svd(whole(), full_matrices=False),
            "randomised SVD of it": lambda whole=whole, r=r: torch.svd_lowrank(whole(), q=r + 8),
            "thin, float64 (ours)": lambda start=start, updates=updates: svd(start, updates),
        }
        rows += compare(f"best rank {r} of {K} clients, {m} x {n}", "SVD of the m x n mean", arms, rounds=5)
    return rows


def rules() -> list[Row]:
    """Every rule on eight clients' MiniSAM factors."""
    start = trainable(prepare(zoo.build("minisam", classes=2), "lora", rank=4))
    rng = torch.Generator().manual_seed(0)
    states = [{n: v + torch.randn(v.shape, generator=rng) for n, v in start.items()} for _ in range(8)]
    updates = [Update(k, state, 1.0) for k, state in enumerate(states)]
    some = {
        "mean": mean,
        "stack": Stack(),
        "padded": padded,
        "svd": svd,
        "residual": residual,
        "fair, closed form": Fair(),
        "fair, optimised": Fair(solve="optimised"),
        "median": median,
        "Krum": Krum(),
        "server Adam": FedAdam(),
    }
    arms = {name: (lambda rule=rule: rule(start, updates)) for name, rule in some.items()}
    return compare("LoRA of minisam, 8 clients of rank 4", "mean", arms, rounds=7)


def measure() -> list[Row]:
    """What do the server's rules cost?"""
    return means() + best_pairs() + rules()


if __name__ == "__main__":
    main(measure)
