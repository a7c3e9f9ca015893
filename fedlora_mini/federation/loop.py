"""The one loop: choose clients, send the news, train, screen, aggregate. All methods and engines go through it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.exchange import Request, Server, Update, refusal
from fedlora_mini.federation.methods import Method
from fedlora_mini.state import State


class Engine(Protocol):
    """Runs clients somewhere: in this process, or over a network."""

    clients: list[int]

    def exchange(self, requests: dict[int, Request]) -> list[Update]:
        """Let every requested client train and return what it shares. A client that fails returns nothing."""
        ...


@dataclass(frozen=True)
class Round:
    """What one round did and cost."""

    round: int
    clients: list[int]
    loss: float
    bytes_up: int
    bytes_down: int
    agg_err: float | None
    seconds: float
    refused: list[str] = field(default_factory=list)


ErrorOf = Callable[[State, State, list[Update]], float | None]


def federate(
    method: Method,
    engine: Engine,
    server: Server,
    keys: Mapping[str, Key],
    rounds: int,
    steps: int,
    choose: Callable[[int], list[int]],
    agg_err: ErrorOf | None = None,
) -> Iterator[Round]:
    """Advance `server` in place, one round per iteration, up to `rounds`.

    Updates are combined in the order of client ids. One that names, shapes or numbers rule out is refused, reported and
    left out; if no usable update is left the run stops with an error and the server keeps its last good state.
    """
    while server.round < rounds:
        t = server.round + 1
        started = perf_counter()
        travels = {n for n, key in keys.items() if method.shared(key) and method.schedule.moves(key, t, steps)}
        before = S.pick(server.state, travels.__contains__)
        requests = {client: Request(t, server.news(client)) for client in choose(t)}
        updates = sorted(engine.exchange(requests), key=lambda update: update.client)
        reasons = {update.client: refusal(update, before) for update in updates}
        good = [update for update in updates if reasons[update.client] is None]
        refused = [reason for reason in reasons.values() if reason]
        refused += [f"client {client}: no answer" for client in sorted(requests.keys() - reasons.keys())]
        if not good:
            raise FedloraError(f"round {t}: no usable update ({'; '.join(refused)}). A smaller --lr often helps.")
        after = server.state | (method.rule(before, good) if travels else {})
        error = agg_err(server.state, after, good) if agg_err is not None else None
        server.seen |= dict.fromkeys(requests, server.round)
        server.state, server.round = after, t
        server.changed |= dict.fromkeys(travels, t)
        total = sum(update.weight for update in good)
        yield Round(
            round=t,
            clients=sorted(requests),
            loss=sum(update.weight * update.loss for update in good) / total,
            bytes_up=sum(S.nbytes(update.state) for update in updates),
            bytes_down=sum(S.nbytes(request.state) for request in requests.values()),
            agg_err=error,
            seconds=perf_counter() - started,
            refused=refused,
        )
