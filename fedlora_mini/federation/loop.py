"""The one loop: choose clients, send the news, train, screen, aggregate. All methods and engines go through it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any, Protocol

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Adapter, Key
from fedlora_mini.errors import Diverged, FedloraError
from fedlora_mini.federation.aggregation.answer import answer
from fedlora_mini.federation.aggregation.padded import truncate
from fedlora_mini.federation.exchange import (
    BANK,
    NOT_FINITE,
    Request,
    Server,
    Update,
    by_client,
    is_model,
    is_note,
    refusal,
    wire_bytes,
)
from fedlora_mini.federation.fold import fold, fresh, products_in
from fedlora_mini.federation.row import Method
from fedlora_mini.state import State


class Engine(Protocol):
    """Runs clients somewhere: in this process, or over a network. One that says `untimed` has its seconds not told.

    `reasons`, where it has them: client -> why it did not answer.
    """

    @property
    def clients(self) -> list[int]: ...

    def exchange(self, requests: dict[int, Request]) -> Iterable[Update]:
        """Let every requested client train; what each shares, in the order of clients. One that fails is left out."""
        ...


@dataclass(frozen=True)
class Round:
    """What one round did and cost. None where it is not told, under privacy.

    Where clients are protected, nothing of what they sent is told but the rule's answer: no loss, no error, nobody
    refused. Where they were drawn by coins, who was drawn is secret too, and with it the bytes and the seconds. Where
    images are, and coins from the operating system draw them, a round takes longer the more were drawn: no seconds.
    """

    round: int
    clients: list[int] | None
    loss: float | None
    bytes_up: int | None
    bytes_down: int | None
    agg_err: float | None
    seconds: float | None
    refused: list[str] = field(default_factory=list)

    def without_clients(self, drawn: bool) -> "Round":
        """What may be told where clients are protected. drawn: by coins, so that it is secret who they were."""
        told = replace(self, loss=None, agg_err=None, refused=[])
        return replace(told, clients=None, bytes_up=None, bytes_down=None, seconds=None) if drawn else told


@dataclass
class Desk:
    """Where updates come in one by one: it refuses bad ones, keeps count, and puts banked messages aside."""

    expected: State
    method: Method
    answered: set[int] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    usable: int = 0
    weight: float = 0.0
    loss: float = 0.0
    bytes: int = 0
    bank: State = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)

    def screen(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The usable ones, without their banked messages."""
        unequal = getattr(self.method.rule, "unequal", False)
        for update in updates:
            self.answered.add(update.client)
            self.bytes += wire_bytes(update.state)
            reason = refusal(update, self.expected, self.method.work.messages, unequal)
            if reason is not None:
                self.refused.append(reason)
                continue
            self.usable += 1
            self.weight += update.weight
            self.loss += update.weight * update.loss
            self.bank |= by_client(update)
            ranks = [len(v) for n, v in update.state.items() if n.endswith(".A")]
            if unequal and ranks:
                self.ranks[update.client] = max(ranks)
            yield replace(update, state=S.pick(update.state, lambda name: not name.startswith(BANK)))


class Meter(Protocol):
    """Sees a round's usable updates one by one, and then says what the rule has lost of them."""

    def add(self, update: Update) -> None: ...

    def value(self, after: State) -> float | None: ...


ErrorOf = Callable[[State, State, list[Update]], float | None]
"""(the server's state before the round, after it, all usable updates) -> the aggregation error."""


@dataclass
class Held:
    """The meter of an error that is a function of all updates: it holds them."""

    error: ErrorOf
    before: State
    updates: list[Update] = field(default_factory=list)

    def add(self, update: Update) -> None:
        self.updates.append(update)

    def value(self, after: State) -> float | None:
        return self.error(self.before, after, self.updates)


def passing(updates: Iterable[Update], meter: Meter) -> Iterator[Update]:
    """The updates as they come, seen by the meter."""
    for update in updates:
        meter.add(update)
        yield update


def federate(
    method: Method,
    engine: Engine,
    server: Server,
    keys: Mapping[str, Key],
    rounds: int,
    steps: int,
    choose: Callable[[int], list[int]],
    agg_err: ErrorOf | None = None,
    layers: Mapping[str, Adapter] | None = None,
    meter: Callable[[State], Meter] | None = None,
) -> Iterator[Round]:
    """Advance `server` in place, one round per iteration, up to `rounds`.

    Updates are combined in the order of client ids. One that names, shapes or numbers rule out is refused, reported and
    left out; if no usable update is left the run stops with an error and the server keeps its last good state. They
    pass one by one, so that a streaming rule holds one state. layers: the adapters by path, for rules that fold
    products into frozen weights. meter: makes of the server's state what measures a round's aggregation error as
    updates pass (`AggregationError`); `agg_err`, a function of them all, has them held instead. Under a silent rule an
    update that cannot be used counts as none and does not stop the run: either would tell of its client.
    """
    silent = getattr(method.rule, "silent", False)
    drawn = silent and getattr(method.rule, "clients", 0) < len(engine.clients)
    meter = partial(Held, agg_err) if agg_err is not None else meter
    while server.round < rounds:
        t, started = server.round + 1, perf_counter()
        travels = {
            n for n, key in keys.items() if method.shared(key) and method.schedule.moves(key, t, steps, server.state)
        }
        before = {name: value for name, value in server.state.items() if name in travels or is_note(name)}
        requests = {client: Request(t, told(method, server, client)) for client in choose(t)}
        desk = Desk(S.pick(before, is_model), method)
        measured = meter(server.state) if meter is not None and not silent else None
        returned = _combine(desk, engine.exchange(requests), before, bool(requests), measured)
        reasons, silence = getattr(engine, "reasons", {}), sorted(requests.keys() - desk.answered)
        desk.refused += [f"client {k}: no answer{f' ({reasons[k]})' if k in reasons else ''}" for k in silence]
        if returned is None:
            why = "nobody answered" if silent else "; ".join(desk.refused)
            kind = Diverged if desk.refused and all(NOT_FINITE in each for each in desk.refused) else FedloraError
            hint = " A smaller --lr often helps." if kind is Diverged else ""
            raise kind(f"round {t}: no usable update ({why}).{hint}")
        server.seen |= dict.fromkeys(desk.answered & requests.keys(), server.round)  # the others may not have heard
        error = _advance(server, desk, returned, layers or {}, measured)
        record = Round(
            round=t,
            clients=sorted(requests),
            loss=desk.loss / desk.weight if desk.usable and not math.isnan(desk.loss) else None,
            bytes_up=desk.bytes,
            bytes_down=sum(wire_bytes(request.state) for request in requests.values()),
            agg_err=error,
            seconds=None if getattr(engine, "untimed", False) else perf_counter() - started,
            refused=desk.refused,
        )
        yield record.without_clients(drawn) if silent else record


def _combine(desk: Desk, updates: Iterable[Update], before: State, asked: bool, measured: Meter | None) -> State | None:
    """The rule's answer to the usable updates, all of which pass the meter; None where it has none without any."""
    rule = desk.method.rule
    arriving = desk.screen(updates)
    first = next(arriving, None)
    if first is None:
        empty = getattr(rule, "empty", False) and (not asked or (getattr(rule, "silent", False) and desk.answered))
        return answer(rule, rule(before, ()), desk.expected) if empty else None
    good: Iterable[Update] = chain([first], arriving)
    good = good if measured is None else passing(good, measured)
    travels = desk.expected or desk.method.work.messages
    returned = answer(rule, rule(before, good), desk.expected) if travels else {}
    for _ in good:
        pass  # where nothing travels no rule reads them
    return returned


def _advance(
    server: Server, desk: Desk, returned: State, layers: Mapping[str, Adapter], measured: Meter | None
) -> float | None:
    """The round's answer, with what was put aside, becomes the server's state; products go into frozen weights.

    Returned: what the meter says of it, before factors are drawn anew.
    """
    t = server.round + 1
    products = products_in(returned)
    new = {name: value for name, value in returned.items() if name not in products} | desk.bank
    new |= fold(server.state, products, layers)
    after = server.state | new
    error = measured.value(after | products) if measured is not None and desk.usable else None
    server.changed |= dict.fromkeys(new, t)
    server.ranks |= desk.ranks
    rule: Any = desk.method.rule
    if getattr(rule, "fresh", False):
        after |= fresh(after, t + 1, layers, rule.seed)
    server.state, server.products, server.round = after, products, t
    return error


def told(method: Method, server: Server, client: int) -> State:
    """The news for one client, as the method's rule offers them, at the client's rank."""
    news = server.news(client)
    offer = getattr(method.rule, "offer", None)
    if offer is not None:
        news = offer(news, server.state, client)
    rank = server.ranks.get(client)
    return news if rank is None else truncate(news, rank)
