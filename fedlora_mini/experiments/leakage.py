"""Leakage of a run: M1 to M6 of every round, each beside its level (chapter 11).

M1 to M4 ask for layers that share one factor and keep the other. Where all or nothing of a pair travels there is M1b,
the spread of what the sites send, and where a layer has two whole branches M2 of these. Experts (k, m, r), which a
router mixes anew for every image, make no B A: their layers have no M1 to M4. What a client did not send has not moved
(`arrived`). Levels, as `<metric>_chance`: M1 with other sites' private factors, M1b from the halves of every site's
images, M2 1 / (m n), M3 with permuted private changes, M4 r / m or r / n, M5 with shuffled names of sites, M6 zero. M1
to M4 are read off the round's updates, M5 and M6 off what the server made of them; M5 (a) needs the updates of all
rounds so far, at least four.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.features import embed, in_use
from fedlora_mini.data.base import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import Method, Request, Server, Update
from fedlora_mini.federation.exchange import is_model, received
from fedlora_mini.federation.loop import told
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.sampling import generator
from fedlora_mini.metrics.classification import recognise
from fedlora_mini.metrics.leakage import (
    changes,
    energy_null,
    explained_null,
    gradients_through,
    leak_cos2,
    leak_energy,
    leak_explained,
    site_spread,
    split_half_spread,
    subspace_overlap,
)
from fedlora_mini.metrics.probe import flat, site_probe, site_probe_null, swap_drop
from fedlora_mini.metrics.segmentation import evaluate
from fedlora_mini.state import State

NULL_DRAWS, FOLDS = 50, 4
AT_THE_END = ("site_probe", "feature_probe", "swap_drop", "heldout")  # told as they ended, not by a mean over rounds


def split_pairs(method: Method, keys: Mapping[str, Key]) -> dict[str, str]:
    """path -> the factor that travels, of every layer of which one of A and B does and the other stays."""
    own: dict[str, dict[str, bool]] = {}
    for key in keys.values():
        if key.factor in ("A", "B"):
            own.setdefault(key.path, {})[key.factor] = method.shared(key)
    return {path: "A" if pair["A"] else "B" for path, pair in own.items() if len(pair) == 2 and pair["A"] != pair["B"]}


def matrices(state: State, *names: str) -> bool:
    """Whether all of these factors are plain matrices, with one product B A for every image."""
    return all(state[name].dim() == 2 for name in names)


@dataclass
class Watch:
    """Looks at a federation's rounds: `begin` before one, `end` with its updates, `after` once the server has them.

    held_out: of every site the images, none of them trained on, that M5 (b) and M6 look at. unseen: images of sites
    that never train, for M6's second half.
    """

    engine: LocalEngine
    server: Server
    held_out: Sequence[Split]
    unseen: Sequence[Split]
    classes: tuple[str, ...]
    before: dict[int, State] = field(default_factory=dict)
    twins: dict[int, Callable[[int], State]] = field(default_factory=dict)  # half of a site's images -> what it sends
    sent: list[list[State]] = field(default_factory=list)  # shared changes by round and site
    start: float | None = None  # M5 (b) before any training
    untrained: list[float] | None = None  # and M6's Dice at unseen sites

    def begin(self, clients: Sequence[int]) -> None:
        """Remember every client's model as the round starts it, and what it is told."""
        state = S.pick(self.server.state, is_model)
        self.before = {k: S.clone(state | self._own(k)) for k in clients}
        self.twins = {k: self._twin(k) for k in clients}

    def memory(self) -> State:
        """What later rounds ask of the past ones, for a checkpoint: "<round>/<tensor>" (K, …), and the two starts."""
        out = {f"{t}/{name}": v for t, row in enumerate(self.sent, 1) for name, v in S.stack(row).items()}
        starts = {"start": self.start, "untrained": self.untrained}
        return out | {name: torch.tensor(v, dtype=torch.float64) for name, v in starts.items() if v is not None}

    def resume(self, memory: State) -> None:
        """Look back on the rounds whose `memory` this is."""
        rounds: dict[str, State] = {}
        for name, value in memory.items():
            t, of_round, tensor = name.partition("/")
            if of_round:
                rounds.setdefault(t, {})[tensor] = value
        self.sent = [S.unstack(row) for row in rounds.values()]
        self.start = float(memory["start"]) if "start" in memory else None
        self.untrained = memory["untrained"].tolist() if "untrained" in memory else None

    def _own(self, client: int) -> State:
        member = self.engine.members[client]
        return member.own(member.memory)

    def _twin(self, client: int) -> Callable[[int], State]:
        """The client's round once more, on every second of its images (half 0 or 1), in batches of half the size."""
        member, own = self.engine.members[client], self.engine.setting
        known = dict(member.memory)
        request = Request(self.server.round + 1, told(own.method, self.server, client))
        setting = replace(own, budget=replace(own.budget, batch=-(-own.budget.batch // 2)))

        def sends(half: int) -> State:
            data = Split(member.data.images[half::2], member.data.masks[half::2])
            return Member(client, data, dict(known), setting).answer(request).state

        return sends

    def end(self, round: int, updates: Sequence[Update]) -> dict[str, Any]:
        """The metrics of this round, each beside its level."""
        weights = [update.weight for update in updates]
        starts = [self.before[u.client] for u in updates]
        shared = [change for u, s in zip(updates, starts, strict=True) if (change := _moved(u.state, s))]
        if not shared:
            return {}
        self.sent.append(shared)
        out = {"site_spread": site_spread(shared, weights)} | self._spread_level(updates, weights)
        ends = [arrived(u.state, s) | self._own(u.client) for u, s in zip(updates, starts, strict=True)]
        out |= branches(ends)
        split = split_pairs(self.engine.method, self.engine.keys)
        pairs = {path: factor for path, factor in split.items() if matrices(ends[0], f"{path}.A", f"{path}.B")}
        if not pairs:
            return out
        rng = generator("leakage", self.engine.setting.seed, round)
        return out | self._energy(round, updates, starts, weights, pairs) | geometry(starts, ends, weights, pairs, rng)

    def _spread_level(self, updates: Sequence[Update], weights: Sequence[float]) -> dict[str, float]:
        """M1b by sampling alone; left out where a site has a single image."""
        members = [self.engine.members[update.client] for update in updates]
        if min(len(member.data) for member in members) < 2:
            return {}
        first, second = ([_moved(self.twins[m.number](h), self.before[m.number]) for m in members] for h in (0, 1))
        return {"site_spread_chance": split_half_spread(first, second, weights)}

    def _energy(
        self,
        round: int,
        updates: Sequence[Update],
        starts: Sequence[State],
        weights: Sequence[float],
        pairs: Mapping[str, str],
    ) -> dict[str, float]:
        """M1 of the round's first gradient, and with the private factors dealt to other sites."""
        engine, through = self.engine, []
        private = {f"{path}.{'B' if factor == 'A' else 'A'}" for path, factor in pairs.items()}
        others = [S.pick(start, private.__contains__) for start in starts]
        for update, start in zip(updates, starts, strict=True):
            member = engine.members[update.client]
            x, y = member.batches(round, engine.setting.budget.of(len(member.data)))(1)
            seen = [*others, S.mean(others, weights)]
            through.append(gradients_through(engine.setting.model, start, seen, pairs, x, y))
        own, average = [row[0] for row in through], [row[-1] for row in through]
        level = energy_null([row[1:-1] for row in through], average, weights)
        return {"leak_energy": leak_energy(own, average, weights), "leak_energy_chance": level}

    def after(self) -> dict[str, Any]:
        """M5 and M6 of the model that the server now has, and of all updates so far."""
        return self._updates() | self._features() | self._swapped() | self._held_out()

    def _updates(self) -> dict[str, Any]:
        """M5 (a) over the rounds that all sites took part in: accuracy, its null's mean and 95 %."""
        rounds = [row for row in self.sent if len(row) == len(self.engine.clients)]
        if len(rounds) < FOLDS or len(self.engine.clients) < 2 or len({tuple(map(len, row)) for row in rounds}) > 1:
            return {}
        if len({tuple(sorted(s)) for row in rounds for s in row}) > 1:
            return {}  # another factor travels from round to round
        found = _probed("site_probe", flat(rounds), generator("probe", self.engine.setting.seed))
        return {"site_probe_rounds": len(rounds)} | found

    def _features(self) -> dict[str, Any]:
        """M5 (b): what the head is given by the shared-only model, private factors at their mean, tells of the site.

        As many images of each site as the smallest has. `feature_probe_start` is the same before anything was trained:
        images that look different are told apart by any features.
        """
        if not self.sent or len(self.held_out) < 2 or min(map(len, self.held_out)) < FOLDS:
            return {}
        if self.start is None:
            self.start = site_probe(self._means({}), FOLDS, centre=False)  # the model itself holds what it started from
        marks = self._means(self.engine.common(self.server))
        found = _probed("feature_probe", marks, generator("features", self.engine.setting.seed), centre=False)
        return found | {"feature_probe_start": self.start}

    @torch.no_grad()
    def _means(self, state: State) -> Tensor:
        """The features' means over pixels: (images, sites, channels)."""
        engine, images = self.engine, min(map(len, self.held_out))
        seen = [engine.method.images(split.images[:images], self.server.state) for split in self.held_out]
        with in_use(engine.setting.model):  # a network that trains its norms would write statistics into the state
            z = [embed(engine.setting.model, state, x.to(engine.device))[1].cpu() for x in seen]
        return torch.stack([each.flatten(2).mean(2) if each.dim() > 2 else each for each in z], 1)

    def _swapped(self) -> dict[str, Any]:
        """M6, what each site loses with another site's private factors; nothing where there are none."""
        privates = [self._own(client) for client in self.engine.clients]
        if len(privates) < 2 or not any(privates):
            return {}

        shared = S.pick(self.server.state, is_model)
        drop = swap_drop(lambda state, k: self._score(state, self.held_out[k]), shared, privates)
        return {"swap_drop": drop.tolist(), "swap_drop_chance": 0.0}

    def _held_out(self) -> dict[str, Any]:
        """M6's other half: the score at every site that never trains, by the shared-only model, and before training."""
        if not self.unseen:
            return {}
        if self.untrained is None:
            self.untrained = [self._score({}, split) for split in self.unseen]
        common = self.engine.common(self.server)
        return {"heldout": [self._score(common, split) for split in self.unseen], "heldout_start": self.untrained}

    def _score(self, state: State, split: Split) -> float:
        """Dice, or accuracy."""
        model, method = self.engine.setting.model, self.engine.method
        seen = replace(split, images=method.images(split.images, self.server.state))
        if seen.labelled:
            return recognise(model, state, seen, self.classes).accuracy
        return evaluate(model, state, seen, self.classes, hd95=False).dice


def ends(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """M5 and M6 of the last of these rounds, with all that stands beside them."""
    return {name: value for name, value in rounds[-1].items() if name.startswith(AT_THE_END)} if rounds else {}


def geometry(
    starts: Sequence[State],
    ends: Sequence[State],
    weights: Sequence[float],
    pairs: Mapping[str, str],
    rng: torch.Generator,
) -> dict[str, float]:
    """M2 to M4 of one round, means over layers (M2 and M4: and sites), each beside its level."""
    own = [changes(start, end, pairs) for start, end in zip(starts, ends, strict=True)]
    mean, middle = S.mean(ends, weights), S.mean(starts, weights)
    together = changes(middle, middle | S.pick(mean, {f"{p}.{f}" for p, f in pairs.items()}.__contains__), pairs)
    cos2, cos2_level, explained, explained_level, overlap, overlap_level = [], [], [], [], [], []
    for path, factor in pairs.items():
        privates = [one[path][1] for one in own]
        explained.append(leak_explained(together[path][0], privates))
        explained_level.append(float(explained_null(together[path][0], privates, rng, NULL_DRAWS).mean()))
        for (B_s, A_s), (B_l, A_l) in (one[path] for one in own):
            cos2.append(leak_cos2((B_s, A_s), (B_l, A_l)))
            cos2_level.append(1 / (B_s.shape[0] * A_s.shape[1]))
            side = (B_s, B_l) if factor == "B" else (A_s.mT, A_l.mT)
            overlap.append(subspace_overlap(*side))
            overlap_level.append(min(1.0, side[0].shape[1] / side[0].shape[0]))
    return {
        "leak_cos2": _mean(cos2),
        "leak_cos2_chance": _mean(cos2_level),
        "leak_explained": _mean(explained),
        "leak_explained_chance": _mean(explained_level),
        "overlap": _mean(overlap),
        "overlap_chance": _mean(overlap_level),
    }


def branches(ends: Sequence[State]) -> dict[str, float]:
    """M2 of layers with a branch B A that travels and B_own A_own that stays, mean over layers and sites."""
    own = [name.removesuffix(".B_own") for name in ends[0] if name.endswith(".B_own")]
    paths = [p for p in own if matrices(ends[0], *(f"{p}.{factor}" for factor in ("A", "B", "A_own", "B_own")))]
    if not paths:
        return {}
    pairs = [[(end[f"{p}.B{o}"], end[f"{p}.A{o}"]) for o in ("", "_own")] for end in ends for p in paths]
    level = _mean([1 / (B.shape[0] * A.shape[1]) for (B, A), _ in pairs])
    return {"leak_cos2": _mean([leak_cos2(*pair) for pair in pairs]), "leak_cos2_chance": level}


def arrived(sent: State, start: State) -> State:
    """`received` at the server's rank: directions beyond the client's stand at their start, as do entries it keeps."""
    out = S.clone(start)
    for name, value in received(sent, start).items():
        out[name][tuple(map(slice, value.shape))] = value
    return out


def _moved(sent: State, start: State) -> State:
    """M (θ - θ_0), the change of every tensor of the model that was sent."""
    start = S.pick(start, sent.__contains__)
    return S.sub(arrived(sent, start), start)


def _probed(name: str, marks: Tensor, rng: torch.Generator, centre: bool = True) -> dict[str, float]:
    """A probe's accuracy, its null's mean and 95 %."""
    null = site_probe_null(marks, rng, folds=FOLDS, centre=centre)
    return {
        name: site_probe(marks, folds=FOLDS, centre=centre),
        f"{name}_chance": float(null.mean()),
        f"{name}_95": float(torch.quantile(null, 0.95)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
