"""What does a round cost beside the clients' training: sending, screening, aggregating, the aggregation error?"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from timing import Row, main, now

from fedlora_mini.engines import local
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.federation import federate, member

METHODS = ("fedit", "fedsa", "iat", "flora", "flexlora", "hetlora", "fedex", "lora_fair")
COMPUTING = ("lora_fair_cosine", "fdlora", "fedas", "resfim")  # optimise, search or take Fisher scores in their rounds
ROUNDS = 3  # after the first, which warms up
OPTIONS = {"per_site": 24, "val": 2, "test": 2, "n_unseen": 0}


class Watch:
    """Seconds inside a function, summed over its calls."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act, self.seconds = act, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        started = now()
        try:
            return self.act(*args, **options)
        finally:
            self.seconds += now() - started


def shares(config: RunConfig, with_error: bool) -> list[tuple[float, float]]:
    """(seconds of the whole round, of its local training), round after round of one run."""
    run, watch, taken = Federation.build(config), Watch(local.train), []
    everyone = lambda round: run.engine.clients  # noqa: E731
    bare = (run.engine.method, run.engine, run.server, run.engine.keys, config.rounds, config.steps, everyone)
    rounds = iter(run.rounds() if with_error else federate(*bare, layers=run.engine.setting.layers))
    with patch.object(local, "train", watch), patch.object(member, "train", watch):
        for _ in range(config.rounds):
            watch.seconds, started = 0.0, now()
            next(rounds)
            taken.append((now() - started, watch.seconds))
    return taken[1:]


def row(setting: str, arm: str, times: list[tuple[float, float]]) -> Row:
    ratios = [whole / training for whole, training in times]
    return {
        "setting": setting,
        "arm": arm,
        "reference": "local training",
        "ms": round(1e3 * statistics.median(whole for whole, _ in times), 3),
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "threads": torch.get_num_threads(),
    }


def measure() -> list[Row]:
    """What does a round cost beside the clients' training?"""
    rows = []
    for name in (*METHODS, *COMPUTING):
        config = RunConfig(
            name, size=48, rounds=ROUNDS + 1, steps=8, batch=4, data_options=OPTIONS, execution="sequential"
        )
        plain, told = shares(config, with_error=False), shares(config, with_error=True)
        setting = f"{name}, 4 clients, 8 steps of 4 images"
        rows.append(row(setting, "local training", [(training, training) for _, training in plain]))
        arm = "round, with what the method computes" if name in COMPUTING else "round"
        rows += [row(setting, arm, plain), row(setting, "round, with its aggregation error", told)]
    return rows


if __name__ == "__main__":
    main(measure)
