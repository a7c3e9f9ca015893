"""Train/validation/test 70/15/15 without leakage: what belongs together (a patient, a video, an image) stays together.

contiguous  naturally sorted items cut into three blocks, so that neighbouring frames of a video share a split
random      single items drawn at random: right only if items are independent
groups      whole groups, given by a group key for every item
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora_mini.errors import FedloraError, unknown

SHARES = (0.70, 0.15, 0.15)  # train, validation, test
GROUPINGS = ("contiguous", "random")


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key with numbers as numbers: frame2 before frame10."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", name) if t]


def block_sizes(n: int) -> tuple[int, int, int]:
    """70/15/15 of n, at least one each."""
    if n < 3:
        raise FedloraError(f"three splits need at least 3 independent items, got {n}")
    val = test = max(1, round(SHARES[1] * n))
    return n - val - test, val, test


def split_items(
    n: int, rng: np.random.Generator, held: np.random.Generator | None = None, *, grouping: str = "contiguous"
) -> list[list[int]]:
    """[train, val, test] indices of n sorted items. Contiguous: the seed decides which end is train's.

    With `held` it draws the test items, and `rng` deals what is left.
    """
    if grouping not in GROUPINGS:
        raise unknown("grouping", grouping, GROUPINGS)
    sizes = block_sizes(n)
    if grouping == "random":
        train, val, test = np.split(rng.permutation(n), np.cumsum(sizes)[:2])
        if held is not None:
            test = held.permutation(n)[sizes[0] + sizes[1] :]
            train, val = np.split(rng.permutation(np.setdiff1d(np.arange(n), test)), [sizes[0]])
        return [sorted(part.tolist()) for part in (train, val, test)]
    order = rng.permutation(3).tolist()
    if held is not None:
        others = iter([part for part in order if part != 2])
        order = [2 if part == 2 else next(others) for part in held.permutation(3).tolist()]
    parts: list[list[int]] = [[], [], []]
    start = 0
    for part in order:
        parts[part] = list(range(start, start + sizes[part]))
        start += sizes[part]
    return parts


def split_groups(
    groups: Sequence[str], rng: np.random.Generator, held: np.random.Generator | None = None
) -> list[list[int]]:
    """[train, val, test] indices with every group whole: largest group first, into the split that lacks most items.

    With `held` it draws the test groups, and `rng` deals what is left.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < 3:
        raise FedloraError(f"three splits need at least 3 groups, got {len(members)}")
    chosen = _deal(members, SHARES, rng if held is None else held)
    if held is not None:
        rest = {name: rows for name, rows in members.items() if name not in chosen[2]}
        chosen = [*_deal(rest, SHARES[:2], rng), chosen[2]]
    return [sorted(i for name in part for i in members[name]) for part in chosen]


def _deal(members: Mapping[str, list[int]], shares: Sequence[float], rng: np.random.Generator) -> list[list[str]]:
    """The groups' names by split, in the proportion of the shares."""
    names = sorted(members)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    shuffled.sort(key=lambda name: -len(members[name]))  # stable: ties stay shuffled
    total = sum(map(len, members.values()))
    lacking = [share / sum(shares) * total for share in shares]
    chosen: list[list[str]] = [[] for _ in shares]
    for name in shuffled:
        part = int(np.argmax(lacking))
        chosen[part].append(name)
        lacking[part] -= len(members[name])
    for part in range(1, len(shares)):
        if not chosen[part]:  # few, large groups: train gives its smallest
            chosen[part].append(chosen[0].pop())
    return chosen
