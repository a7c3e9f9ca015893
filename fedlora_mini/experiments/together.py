"""Which stored runs stand in one report, and which of two arms' runs are a pair.

A pair has one seed, one data set and the same sites: then both arms met the same images. Runs that differ in more than
their seed are no repetitions of each other, so they are arms of their own.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import arm_of
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.federation.methods import method

Result = dict[str, Any]

DATA = ("data", "data_options", "size", "dirichlet", "clients")
PROTOCOLS = ("personal", "global", "new site")
TOLD = ("trained", "bytes_up", "agg_err", "seconds")
NEUTRAL = {"seed", "change", "device", "threads", "execution", "micro", "eval_every", "leakage"}
"""Settings in which the runs of an arm may differ: they move last bits, or what is looked at."""


def kind(record: Mapping[str, Any]) -> str:
    """What a record is if it is no tested run of a method; empty if it is one."""
    config, scores = record.get("config", {}), record.get("scores")
    if "arm" in config and "shots" in config:
        return "a few-shot run, which `fedlora fewshot` reports"
    if "method" not in config or not set(RunConfig().asdict()) >= set(config):
        return "a record of no method"
    if not isinstance(scores, dict) or not scores.get("personal"):
        searched = "val_dice" in record or "val_accuracy" in record
        return "a run of a search, which looked at no test image" if searched else "a measurement without test scores"
    if missing := [name for name in TOLD if name not in record]:
        return f"a run without '{missing[0]}'"
    return ""


def check(results: Sequence[Result]) -> None:
    """Raise unless all are tested runs of known methods, with one metric and the same sites."""
    for r in results:
        if what := kind(r):
            raise FedloraError(f"cannot report {what}; accepted: records of `fedlora run`, `compare` or `private`")
        method(r["config"]["method"])
    seen = {_looked_at(r): r for r in reversed(results)}
    if len(seen) > 1:
        (one, a), (other, b) = list(seen.items())[:2]
        what = "metrics" if one[0] != other[0] else "sites"
        raise FedloraError(
            f"runs with other {what} are no part of one report: {_words(one, a)}, but {_words(other, b)}; "
            "report them apart"
        )


def _looked_at(r: Result) -> tuple[str, ...]:
    """Metrics, and the sites of each protocol."""
    metrics = ", ".join(name for name in ("dice", "accuracy") if name in next(iter(r["scores"]["personal"].values())))
    return metrics, *(", ".join(r["scores"].get(protocol, ())) for protocol in PROTOCOLS)


def _words(seen: tuple[str, ...], r: Result) -> str:
    named = [f"{protocol} {names}" for protocol, names in zip(PROTOCOLS[::2], seen[1::2], strict=True) if names]
    return f"'{arm_of(r['config'])}' has {seen[0]} of {', '.join(named)}"


def told_apart(results: Sequence[Result]) -> list[Result]:
    """The same runs; where those of an arm differ in more than their seed, what differs is named in their arms.

    A rate that a search has chosen is none of that: it may be another for every seed. Raises where an arm then has two
    runs of one seed.
    """
    full = [RunConfig().asdict() | r["config"] | ({"lr": "searched"} if "search" in r else {}) for r in results]
    own = [arm_of(r["config"]) for r in results]
    values: dict[tuple[str, str], set[str]] = {}
    for arm, config in zip(own, full, strict=True):
        for name in config.keys() - NEUTRAL:
            values.setdefault((arm, name), set()).add(json.dumps(config[name], sort_keys=True))
    out = []
    for r, arm, config in zip(results, own, full, strict=True):
        more = {name: config[name] for name in config if len(values.get((arm, name), ())) > 1}
        out.append(r | {"config": r["config"] | {"change": r["config"].get("change", {}) | more}} if more else r)
    for arm in {arm_of(r["config"]) for r in out}:
        _by_key(out, arm, "personal")
    return out


def matched(results: Sequence[Result], a: str, b: str, protocol: str) -> tuple[list[Result], list[Result], list[str]]:
    """The runs of both arms that are pairs, in one order, and in words what only one of them has."""
    left, right = (_by_key(results, arm, protocol) for arm in (a, b))
    common = [key for key in left if key in right]
    alone = [
        f"seed {r['config']['seed']} of {arm}"
        for arm, mine, other in ((a, left, right), (b, right, left))
        for key, r in mine.items()
        if key not in other
    ]
    return [left[key] for key in common], [right[key] for key in common], alone


def _by_key(results: Sequence[Result], arm: str, protocol: str) -> dict[tuple[int, str], Result]:
    """(seed, data and sites) -> its run, seeds ascending."""
    found: dict[tuple[int, str], Result] = {}
    for r in results:
        if arm_of(r["config"]) == arm and protocol in r["scores"]:
            what = [r["config"].get(name) for name in DATA], list(r["scores"][protocol])
            key = r["config"]["seed"], json.dumps(what, sort_keys=True)
            if key in found:
                differ = [name for name, own in r["config"].items() if own != found[key]["config"].get(name)]
                told = f"two runs of seed {key[0]}, which differ in {', '.join(differ) or 'no setting'}"
                raise FedloraError(f"arm '{arm}' has {told}: report them apart")
            found[key] = r
    return dict(sorted(found.items()))
