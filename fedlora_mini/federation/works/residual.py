"""Res_k = 1/(K-1) Σ_{j≠k} |F_{k→j} - F_k|: what a change of style would do to the Fisher information stays at home.

pFL-ResFIM (chapter 12; the quantities are our reconstruction). F_k is the diagonal Fisher information on the
client's images, F_{k→j} on the same images in client j's style. Within each tensor the share `tau` of entries with the
largest Res is sensitive: M = 0, kept. The rest is averaged: θ̄_i = Σ p_k M_ki θ_ki / Σ p_k M_ki, θ_k <- M θ̄ + (1-M) θ_k.
What is disclosed: every client's mean low-frequency amplitude, once, and which entries it keeps. Norms' statistics are
no parameters: they have no Fisher information and are averaged whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora_mini import state as S
from fedlora_mini.accepted import ranges
from fedlora_mini.adapters.features import statistic
from fedlora_mini.chance import seeded
from fedlora_mini.data.base import Split
from fedlora_mini.data.spectral import low_frequencies, low_frequency_swap
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.exchange import BANK, MASK
from fedlora_mini.federation.fisher import diagonal_fisher
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

STYLE = f"{BANK}style"
SENSITIVE, HOME = "~sensitive/", "~home/"


def restyled(data: Split, amplitude: Tensor, ratio: float, mixing: float) -> Split:
    """The images with another client's low-frequency amplitude, clipped to [0, 1]; the labels stay."""
    return Split(low_frequency_swap(data.images, amplitude, ratio, mixing).clamp(0, 1), data.masks)


def residual(work: "ResFIM", client: Member, end: State) -> State:
    """Res_k, or 1/(K-1) Σ |F_{k→j} - F_k| / F_k with `relative`; empty where no other style is known."""
    data = Split(client.data.images[: work.images], client.data.masks[: work.images])
    others = [a for n, a in client.recall(f"{STYLE}/").items() if n != str(client.number)]
    if not others:
        return {}

    def fisher(split: Split) -> State:
        return diagonal_fisher(client.setting.model, end, split, work.images)

    own, change = fisher(data), []
    for amplitude in others:
        moved = fisher(restyled(data, amplitude, work.ratio, work.mixing))
        change.append({name: (value - own[name]).abs() for name, value in moved.items()})
    mean = S.mean(change, [1.0] * len(change))
    return {n: v / (own[n] + 1e-8) for n, v in mean.items()} if work.relative else mean


def earliness(change: State, F: State, region: Callable[[str], str]) -> float:
    """log of (Σ |change| / Σ F in the encoder) / (the same in the decoder): above 0, the encoder changes more."""

    def share(where: str) -> float:
        names = [name for name in F if region(name) == where]
        return sum(float(change[n].abs().sum()) for n in names) / sum(float(F[n].sum()) for n in names)

    return math.log(share("encoder") / share("decoder"))


def information(work: "ResFIM", client: Member, end: State) -> State:
    """Control: F_k itself."""
    return diagonal_fisher(client.setting.model, end, client.data, work.images)


def movement(work: "ResFIM", client: Member, end: State) -> State:
    """Control: how far this round's training moved each entry."""
    start = work.blend(client.tensors, client)
    return {name: (value - start[name]).abs() for name, value in end.items()}


def lottery(work: "ResFIM", client: Member, end: State) -> State:
    """Control: random numbers, the same in every round: a fixed random mask."""
    rng = seeded(f"lottery {client.setting.seed} {client.number}")
    return {name: torch.rand(value.shape, generator=rng).to(value.device) for name, value in end.items()}


SCORES: dict[str, Callable[["ResFIM", Member, State], State]] = {
    "residual": residual,
    "information": information,
    "movement": movement,
    "lottery": lottery,
}


def sensitive(scores: Tensor, tau: float) -> Tensor:
    """True for the share tau in [0, 1] of entries, rounded, with the largest scores; of equal ones the first."""
    if not 0 <= tau <= 1:
        raise FedloraError(f"tau is a share in [0, 1], got {tau}")
    order = scores.flatten().argsort(descending=True, stable=True)[: round(tau * scores.numel())]
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill_(0, order, True).view_as(scores)


def directions(scores: State, tau: float) -> State:
    """Masks of LoRA pairs by rank direction: A's row i and B's column i, by the sum of both, stay or go together.

    Then what is shared of a layer is a sum of whole rank-one terms, while a mask of entries cuts through all of them.
    """
    out: State = {}
    for name, A in scores.items():
        path, _, factor = name.rpartition(".")
        if factor == "A" and f"{path}.B" in scores:
            B = scores[f"{path}.B"]
            stays = sensitive(A.sum(1) + B.sum(0), tau)  # (r,)
            out |= {name: stays[:, None].expand_as(A).clone(), f"{path}.B": stays.expand_as(B).clone()}
    return out


@dataclass(frozen=True)
class ResFIM(Work):
    """score: a row of SCORES. level: "entry", or "direction" for LoRA. The first `warmup` rounds are FedAvg.

    warmup: 1, the least, since styles are known from the second round on. The paper's number we do not know; chapter
    12 says what more would leave of the stored runs' 8 rounds.
    once: the first mask stays for good, as the lottery's does; else each round draws its own.
    """

    tau: float = 0.2
    score: str = "residual"
    level: str = "entry"
    ratio: float = 0.05
    mixing: float = 1.0
    images: int = 64
    warmup: int = 1
    relative: bool = False
    once: bool = False

    messages = (f"*{MASK}", STYLE)
    notes = personal_notes = (SENSITIVE, HOME)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        if self.level not in ("entry", "direction"):
            raise unknown("level", self.level, ("entry", "direction"))
        ranges(self, tau="[0, 1]", ratio="[0, 0.5]", mixing="[0, 1]", images="[1, inf)", warmup="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        what = {"entry": "entries", "direction": "directions"}[self.level]
        return f"keeps the {self.tau:.0%} most sensitive {what} by {self.score}"

    def blend(self, state: State, client: Member) -> State:
        """M θ̄ + (1 - M) θ_k."""
        kept, home = client.recall(SENSITIVE), client.recall(HOME)
        return {n: torch.where(kept[n].bool(), home[n], v) if n in kept else v for n, v in state.items()}

    def masks(self, client: Member, end: State) -> State:
        """True where sensitive, for every shared tensor that a gradient moves; empty where nothing is known yet."""
        if self.once and (known := client.recall(SENSITIVE)):
            return {name: mask.bool() for name, mask in known.items()}
        scores = SCORES[self.score](self, client, end)
        scores = S.pick(scores, lambda name: not client.setting.private(name) and not statistic(name))
        out = {name: sensitive(value, self.tau) for name, value in scores.items()}
        return out | (directions(scores, self.tau) if self.level == "direction" else {})

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        if self.level == "direction" and not any(key.factor == "A" for key in client.setting.keys.values()):
            raise FedloraError("level 'direction' needs factors A and B, as in row 'resfim_lora'; here only 'entry' is")
        end, loss = client.fit(round, self.blend(client.tensors, client))
        masks = self.masks(client, end) if round > self.warmup else {}
        client.keep(SENSITIVE, masks)
        client.keep(HOME, {name: end[name] for name in masks})
        said = f"{STYLE}/{client.number}" in client.memory
        say = {} if said else {STYLE: low_frequencies(client.data.images, self.ratio)}
        say |= {f"{name}{MASK}": (~mask).to(torch.uint8) for name, mask in masks.items()}
        return end | {name: end[name].masked_fill(mask, 0.0) for name, mask in masks.items()}, loss, say

    def personal(self, state: State, client: Member) -> State:
        return self.blend(state, client)

    def look(self, state: State, client: Member) -> dict[str, float]:
        """How early the residual sits, and how much earlier than its floor, as `earliness` has it.

        The floor is the change under the transfer to the client's own mean amplitude, which tells of no other site.
        Nothing where the network has no decoder.
        """
        plain, keys = replace(self, relative=False), client.setting.keys
        found = residual(plain, client, state)
        if not {"encoder", "decoder"} <= {keys[name].region for name in found}:
            return {}
        data = Split(client.data.images[: self.images], client.data.masks[: self.images])
        F = diagonal_fisher(client.setting.model, state, data, self.images)
        own = restyled(data, low_frequencies(client.data.images, self.ratio), self.ratio, self.mixing)
        floor = S.sub(diagonal_fisher(client.setting.model, state, own, self.images), F)
        early, least = (earliness(change, F, lambda name: keys[name].region) for change in (found, floor))
        return {"early": early, "beyond_floor": early - least}
