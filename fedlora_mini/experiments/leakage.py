"""Leakage of a run, round by round: M1 to M4 after every round, M5 and M6 at the end (methods.md card 3).

M1 to M4 ask for layers that share one factor and keep the other; where all or nothing of a pair travels there is only
M1b, the spread of what the sites send.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import Method, Server, Update
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.sampling import generator
from fedlora_mini.metrics.leakage import (
    changes,
    explained_null,
    leak_cos2,
    leak_energy,
    leak_explained,
    shared_gradients,
    site_spread,
    subspace_overlap,
)
from fedlora_mini.metrics.probe import flat, site_probe, site_probe_null
from fedlora_mini.state import State

NULL_DRAWS = 50


def split_pairs(method: Method, keys: Mapping[str, Key]) -> dict[str, str]:
    """path -> the factor that travels, of every layer of which one of A and B does and the other stays."""
    own: dict[str, dict[str, bool]] = {}
    for key in keys.values():
        if key.factor in ("A", "B"):
            own.setdefault(key.path, {})[key.factor] = method.shared(key)
    return {path: "A" if pair["A"] else "B" for path, pair in own.items() if len(pair) == 2 and pair["A"] != pair["B"]}


@dataclass
class Watch:
    """Looks at a federation's rounds: `begin` before one, `end` with its updates, `final` once all are over."""

    engine: LocalEngine
    server: Server
    before: dict[int, State] = field(default_factory=dict)
    sent: list[list[State]] = field(default_factory=list)  # shared changes by round and site

    def begin(self, clients: Sequence[int]) -> None:
        """Remember every client's model as the round starts it."""
        state = S.pick(self.server.state, is_model)
        self.before = {k: S.clone(state | self._own(k)) for k in clients}

    def _own(self, client: int) -> State:
        member = self.engine.members[client]
        return member.own(member.memory)

    def end(self, round: int, updates: Sequence[Update]) -> dict[str, Any]:
        """The metrics of this round, each beside its chance level."""
        weights = [update.weight for update in updates]
        starts = [self.before[u.client] for u in updates]
        shared = [S.sub(tensors, S.pick(s, tensors.__contains__)) for u, s in zip(updates, starts, strict=True)
                  if (tensors := S.pick(u.state, is_model))]  # fmt: skip
        if not shared:
            return {}
        self.sent.append(shared)
        out: dict[str, Any] = {"site_spread": site_spread(shared, weights)}
        pairs = split_pairs(self.engine.method, self.engine.keys)
        if not pairs:
            return out
        out["leak_energy"] = self._energy(round, updates, starts, weights, pairs)
        ends = [s | S.pick(u.state, is_model) | self._own(u.client) for u, s in zip(updates, starts, strict=True)]
        own = [changes(start, end, pairs) for start, end in zip(starts, ends, strict=True)]
        mean = S.mean(ends, weights)
        middle = S.mean(starts, weights)
        together = changes(middle, middle | S.pick(mean, {f"{p}.{f}" for p, f in pairs.items()}.__contains__), pairs)
        rng = generator("leakage", self.engine.setting.seed, round)
        cos2, explained, chance, overlap, by_chance = [], [], [], [], []
        for path, factor in pairs.items():
            privates = [one[path][1] for one in own]
            cos2 += [leak_cos2(*one[path]) for one in own]
            explained.append(leak_explained(together[path][0], privates))
            chance.append(float(explained_null(together[path][0], privates, rng, NULL_DRAWS).mean()))
            for (B_s, A_s), (B_l, A_l) in (one[path] for one in own):
                side = (B_s, B_l) if factor == "B" else (A_s.mT, A_l.mT)
                overlap.append(subspace_overlap(*side))
                by_chance.append(side[0].shape[1] / side[0].shape[0])
        return out | {
            "leak_cos2": _mean(cos2),
            "leak_explained": _mean(explained),
            "leak_explained_chance": _mean(chance),
            "overlap": _mean(overlap),
            "overlap_chance": min(1.0, _mean(by_chance)),
        }

    def _energy(
        self,
        round: int,
        updates: Sequence[Update],
        starts: Sequence[State],
        weights: Sequence[float],
        pairs: Mapping[str, str],
    ) -> float:
        """M1 of the round's first gradient."""
        engine = self.engine
        private = {f"{path}.{'B' if factor == 'A' else 'A'}" for path, factor in pairs.items()}
        average = S.mean([S.pick(start, private.__contains__) for start in starts], weights)
        own, at_average = [], []
        for update, start in zip(updates, starts, strict=True):
            member = engine.members[update.client]
            x, y = member.batches(round, engine.setting.budget.of(len(member.data)))(1)
            a, b = shared_gradients(engine.setting.model, start, average, pairs, x, y)
            own.append(a)
            at_average.append(b)
        return leak_energy(own, at_average, weights)

    def final(self) -> dict[str, Any]:
        """M5 over the rounds that all sites took part in since a resume: accuracy, its null's mean and 95 %."""
        rounds = [row for row in self.sent if len(row) == len(self.engine.clients)]
        if len(rounds) < 4 or len(self.engine.clients) < 2 or len({tuple(map(len, row)) for row in rounds}) > 1:
            return {}
        if len({tuple(sorted(s)) for row in rounds for s in row}) > 1:
            return {}  # another factor travels from round to round
        updates = flat(rounds)
        null = site_probe_null(updates, generator("probe", self.engine.setting.seed), folds=4)
        return {
            "site_probe_rounds": len(rounds),
            "site_probe": site_probe(updates, folds=4),
            "site_probe_chance": float(null.mean()),
            "site_probe_95": float(torch.quantile(null, 0.95)),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
