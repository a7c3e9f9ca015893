"""Client k is told the mean of all clients but k, factor by factor: FedALT's "rest of the world". Bian et al. 2025."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedlora_mini import state as S
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.exchange import OWN, Update
from fedlora_mini.state import State

DESK = f"{OWN}client "


@dataclass(frozen=True)
class Others:
    """The server remembers the last A and B of every client. What it offers stands under A_rest and B_rest.

    The mean is weighted by the clients' images. Everything else that is shared (the head) is averaged as usual.
    """

    label = "the others' mean for each client"

    def __call__(self, server: State, updates: Iterable[Update]) -> State:
        updates = list(updates)
        out = mean(server, updates)
        for u in updates:
            pair = S.pick(u.state, lambda name: name.endswith((".A", ".B")))
            out |= {f"{DESK}{u.client}/{name}": value for name, value in pair.items()}
            out[f"{DESK}{u.client}/weight"] = torch.tensor(u.weight, dtype=torch.float64)
        return out

    def offer(self, news: State, state: State, client: int) -> State:
        """The news without the mean of A and B, with A_rest and B_rest."""
        told = {name: value for name, value in news.items() if not name.endswith((".A", ".B"))}
        desks: dict[str, State] = {}
        for name, value in state.items():
            if name.startswith(DESK):
                number, _, rest = name.removeprefix(DESK).partition("/")
                desks.setdefault(number, {})[rest] = value
        others = [desk for number, desk in desks.items() if int(number) != client]
        if others:
            weights = [float(desk["weight"]) for desk in others]
            pairs = [S.pick(desk, lambda name: name != "weight") for desk in others]
            told |= {f"{name}_rest": value for name, value in S.mean(pairs, weights).items()}
        return told
