"""A/B/A/B timing in one process: ratios within a round, then their median. Absolute times drift, ratios hardly do."""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def now() -> float:
    """Processor time where one thread does the work, so that other programs count little; else the clock's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(act: Callable[[], Any], times: int) -> float:
    start = now()
    for _ in range(times):
        act()
    return (now() - start) / times


def peak(act: Callable[[], Any]) -> float:
    """MiB: the most that torch's tensors hold at once during one call, beyond what they held before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        act()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return max(held, default=0) / 2**20


def compare(
    setting: str, reference: str, arms: dict[str, Callable[[], Any]], rounds: int = 11, memory: bool = False
) -> list[Row]:
    """One row an arm: its time, and the ratio to `reference`, median and range over interleaved rounds.

    memory: its `peak` as well.
    """
    times = {}
    for name, act in arms.items():
        act()  # warm up
        times[name] = max(1, min(50, int(0.03 / max(seconds(act, 1), 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(rounds):
        for name in list(arms)[:: 1 if k % 2 == 0 else -1]:  # the order turns round, so that none is always first
            taken[name].append(seconds(arms[name], times[name]))
    rows = []
    for name, own in taken.items():
        ratios = [a / b for a, b in zip(own, taken[reference], strict=True)]
        extra = {"mib": round(peak(arms[name]), 1)} if memory else {}
        rows.append(
            {
                "setting": setting,
                "arm": name,
                "reference": reference,
                "ms": round(1e3 * statistics.median(own), 3),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "threads": torch.get_num_threads(),
            }
            | extra
        )
    return rows


def main(measure: Callable[[], list[Row]]) -> None:
    """Run one script: `python benchmarks/<script>.py --threads 1` prints its rows as JSON on the last line."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(json.dumps(measure()))
