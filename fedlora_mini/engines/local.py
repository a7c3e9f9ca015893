"""Clients simulated in this process: one after another, or several in one pass along the group axis."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key, trainable
from fedlora_mini.data.base import Split
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.exchange import Request, Server, Update
from fedlora_mini.federation.methods import Method
from fedlora_mini.federation.sampling import batch_indices, flips, generator
from fedlora_mini.state import State

EXECUTIONS = ("auto", "sequential", "grouped")
SMALL = 4


class LocalEngine:
    """`model` is prepared for the method's adapter; `data[k]` is client k's training split.

    execution: "sequential", "grouped" (equal to it up to rounding), or "auto" = grouped where it can be and pays: on an
    accelerator, and on a CPU up to batches of SMALL, beyond which the loop is faster (benchmarks/README.md).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        keys: Mapping[str, Key],
        data: Sequence[Split],
        budget: Budget,
        seed: int = 0,
        execution: str = "auto",
        precision: str = "float32",
    ) -> None:
        if execution not in EXECUTIONS:
            raise unknown("execution", execution, EXECUTIONS)
        self.model, self.method, self.keys, self.budget = model, method, keys, budget
        self.seed, self.precision = seed, precision
        self.device = next(model.parameters()).device
        self.data = [Split(split.images.to(self.device), split.masks.to(self.device)) for split in data]
        self.clients = list(range(len(data)))
        start = trainable(model)
        self.memory: dict[int, State] = {client: dict(start) for client in self.clients}
        can = all(key.factor in _factors(model, key.path) for key in keys.values())
        if execution == "grouped" and not can:
            raise FedloraError(
                f"'{method.title}' trains a model's own weights, which have no group axis: use execution 'sequential'"
            )
        can = can and all(term.grouped for term in method.objective)
        pays = self.device.type != "cpu" or budget.batch <= SMALL
        self.grouped = can and pays if execution == "auto" else execution == "grouped"

    def private(self, name: str) -> bool:
        """Whether a tensor never leaves its client."""
        return not self.method.shared(self.keys[name])

    def exchange(self, requests: dict[int, Request]) -> list[Update]:
        for client, request in requests.items():
            self.memory[client] |= request.state
        order = sorted(requests)
        groups = [order] if self.grouped else [[client] for client in order]
        return [update for group in groups for update in self._train(group, requests[group[0]].round)]

    def _train(self, group: list[int], round: int) -> list[Update]:
        indices, rngs = [], []
        for client in group:
            rng = generator(self.seed, round, client, "batches")
            indices.append(batch_indices(len(self.data[client]), self.budget.batch, self.budget.steps, rng))
            rngs.append(rng)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            parts = []
            for client, index, rng in zip(group, indices, rngs, strict=True):
                rows = index[step - 1].to(self.device)
                x, y = self.data[client].images[rows], self.data[client].masks[rows]
                parts.append(flips(x, y, rng) if self.budget.augment else (x, y))
            return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

        starts = [self.memory[client] for client in group]
        ends, losses = train(self.model, self.method, self.keys, starts, batches, self.budget, round, self.precision)
        return [self._close(*each, round) for each in zip(group, ends, losses, strict=True)]

    def _close(self, client: int, end: State, loss: float, round: int) -> Update:
        """Keep the private part, unless it is broken; hand out what travels."""
        own = S.pick(end, self.private)
        if S.finite(own):
            self.memory[client] |= own
        moves = self.method.schedule.moves
        sent = S.pick(end, lambda n: not self.private(n) and moves(self.keys[n], round, self.budget.steps))
        return Update(client, sent, float(len(self.data[client])), loss)

    def personal(self, client: int, server: Server) -> State:
        """The client's own model: the server's shared tensors with the client's private ones."""
        return server.state | S.pick(self.memory[client], self.private)

    def common(self, server: Server) -> State:
        """The model for a site that never trained: shared tensors, and private ones at their weighted mean."""
        own = [S.pick(self.memory[client], self.private) for client in self.clients]
        return server.state | S.mean(own, [float(len(self.data[client])) for client in self.clients])


def _factors(model: nn.Module, path: str) -> tuple[str, ...]:
    return getattr(model.get_submodule(path), "factors", ())
