"""The method table in words and bytes, and the proof by a tiny run: what was really trained, sent and kept."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.base import REGIONS, Key
from fedlora_mini.adapters.registry import ADAPTERS
from fedlora_mini.data import Dataset, load
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import Budget, Request, Server, Update, federate, method
from fedlora_mini.federation.client import moves_at_all
from fedlora_mini.federation.exchange import is_model, is_note
from fedlora_mini.federation.member import Member
from fedlora_mini.models import build
from fedlora_mini.models.zoo import check_size, check_task
from fedlora_mini.state import State

SITES = 3


def words(chosen: Iterable[Key], table: Iterable[Key]) -> str:
    """A set of tensors by factor and region: "A, B, head", "B of encoder, A of decoder", "encoder, head"."""
    chosen, table = set(chosen), set(table)
    norms = {key for key in table if key.kind == "norm"}
    if norms and chosen == norms:
        return "norms"
    if norms and chosen == table - norms:
        return f"{words(chosen, chosen)}, without norms"
    factors: dict[str, set[str]] = {name: set() for name in REGIONS}
    every: dict[str, set[str]] = {name: set() for name in REGIONS}
    for key in chosen:
        factors[key.region].add(key.factor)
    for key in table:
        every[key.region].add(key.factor)
    body = [name for name in REGIONS[:2] if every[name]]
    many = any("weight" in every[name] for name in body)  # a network's own weights have no roles worth naming
    text = []
    if body and all(factors[name] == factors[body[0]] for name in body) and factors[body[0]] and not many:
        text += sorted(factors[body[0]])
    else:
        for name in body:
            if factors[name] == every[name] and factors[name]:
                text.append(name if many else f"{', '.join(sorted(factors[name]))} of {name}")
            elif factors[name]:
                rest = sorted(every[name] - factors[name])
                text.append(
                    f"{name} without {', '.join(rest)}" if many else f"{', '.join(sorted(factors[name]))} of {name}"
                )
    if factors["head"]:
        whole = factors["head"] == every["head"]
        text.append("head" if whole else f"{', '.join(sorted(factors['head']))} of head")
    return ", ".join(text) or "-"


@dataclass(frozen=True)
class Row:
    """A method in words, with the bytes that one client sends and receives in a typical round (the second)."""

    name: str
    title: str
    adapter: str
    trained: str
    sent: str
    kept: str
    server: str
    beside: str  # objective and work
    bytes_up: int
    bytes_down: int


def setting(name: str, model: str = "minisam", data: Dataset | None = None) -> tuple[LocalEngine, Server]:
    """A tiny federation of the row: SITES clients of six 32-pixel phantoms."""
    row = method(name)
    data = load("phantom", size=32, sites=SITES, unseen=0, per_site=6, val=2, test=2) if data is None else data
    options: dict[str, Any] = {"rank": 4, "sites": 1 if row.pooled else SITES}
    known = ADAPTERS[row.adapter].options
    network = prepare(build(model, len(data.classes)), row.adapter, **{n: v for n, v in options.items() if n in known})
    start = trainable(network)
    splits = [site.train for site in data.sites]
    splits = [type(splits[0]).concat(splits)] if row.pooled else splits
    budget = Budget(steps=4, batch=2, lr=1e-3)
    return LocalEngine(network, row, keys(network, list(start)), splits, budget), Server(start)


def describe(name: str, engine: LocalEngine, up: int, down: int) -> Row:
    """The row's words, from the tensors of a network."""
    row, table, budget = engine.method, engine.keys, engine.setting.budget
    layers = engine.setting.layers
    moving = [
        key for key in table.values() if moves_at_all(key, layers) and row.schedule.may_move(key, 2, budget.steps)
    ]
    sent = [key for key in table.values() if row.shared(key) and key in moving]
    kept = [key for key in table.values() if not row.shared(key)]
    say = words(sent, table.values()) if sent else ""
    messages = [_plain(m) for m in row.work.messages]
    notes = [_plain(m) for m in row.work.notes]
    held = words(kept, table.values()) if kept else ""
    rule = str(getattr(row.rule, "label", None) or getattr(row.rule, "__name__", type(row.rule).__name__))
    beside = [term.label for term in row.objective] + ([row.work.label] if row.work.label else [])
    return Row(
        name,
        row.title,
        row.adapter,
        words(moving, table.values())
        + ("" if row.schedule.label == "all at every step" else f" ({row.schedule.label})"),
        "everything, at one client" if row.pooled else ", ".join(filter(None, [say, *messages])) or "nothing",
        ", ".join(filter(None, [held, *notes])) or "nothing",
        "-" if not (sent or messages) else rule.replace("_", " "),
        "; ".join(beside) or "-",
        up,
        down,
    )


def _plain(pattern: str) -> str:
    """A note's name as a word: "~bank/head/*" -> "head"."""
    return {"*~mask": "masks", "~bank/style": "amplitude", "~bank/head/*": "head"}.get(
        pattern, pattern.strip("~*/").rpartition("/")[2]
    )


@dataclass
class Watched(Member):
    """A client that tells what it begins a round with: `begun`, what it calls its own once it has heard the news."""

    begun: State = field(default_factory=dict)

    def receive(self, request: Request) -> None:
        super().receive(request)
        self.begun = own_of(self)


def own_of(member: Member) -> State:
    """Its private tensors, and the notes that its work keeps."""
    return member.own(member.tensors) | S.pick(member.notes, lambda n: n.startswith(member.setting.method.work.notes))


@dataclass
class Witness:
    """An engine that looks over another's shoulder: what travelled, and whether it may; what should stay, and did it.

    kept: what every client called its own when its last round ended.
    """

    engine: LocalEngine
    problems: list[str] = field(default_factory=list)
    moved: set[tuple[str, str]] = field(default_factory=set)
    kept: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine.members = [Watched(m.number, m.data, m.memory, m.setting) for m in self.engine.members]

    @property
    def clients(self) -> list[int]:
        return self.engine.clients

    def exchange(self, requests: dict[int, Request]) -> list[Update]:
        """The other engine's updates; what is wrong with them is noted down."""
        before = {client: dict(memory) for client, memory in self.engine.memory.items()}
        told = {client: dict(request.state) for client, request in requests.items()}
        updates = list(self.engine.exchange(requests))
        row, table, budget = self.engine.method, self.engine.keys, self.engine.setting.budget
        for update in updates:
            when = requests[update.client].round, budget.steps, before[update.client] | told[update.client]
            expected = {n for n, k in table.items() if row.shared(k) and row.schedule.moves(k, *when)}
            self._same("sends", update.client, expected, {n for n in update.state if is_model(n)})
            odd = [n for n in update.state if is_note(n) and not any(fnmatch(n, p) for p in row.work.messages)]
            odd += [n for n in told[update.client] if self.engine.private(n) and not n.endswith("_rest")]
            if odd:
                self.problems.append(f"client {update.client}: '{odd[0]}' travelled and should not")
            self._moved(update, before[update.client] | told[update.client])
            self._found(update.client, told[update.client])
        return updates

    def end(self) -> None:
        """Note down what a client should hold of its own and does not, and what was trained and is the same at two."""
        engine, layers = self.engine, self.engine.setting.layers
        private = {name: key for name, key in engine.keys.items() if engine.private(name)}
        trained = {n for n, k in private.items() if (k.region, k.factor) in self.moved and moves_at_all(k, layers)}
        parts = {"private tensors": trained} if trained else {}
        for note in engine.method.work.notes:
            parts[note] = {name for kept in self.kept.values() for name in kept if name.startswith(note)}
        for words, names in parts.items():
            held = {client: S.pick(kept, names.__contains__) for client, kept in self.kept.items()}
            without = [client for client, state in held.items() if not state or len(state) < len(names)]
            self.problems += [f"client {client} does not keep '{words}'" for client in without]
            if not without and len({S.digest(state) for state in held.values()}) < len(held):
                self.problems.append(f"clients keep the same '{words}'")

    def _found(self, client: int, told: State) -> None:
        """Note down what a client did not find again when this round began; what it was told is another matter."""
        member = self.engine.members[client]
        assert isinstance(member, Watched)
        last, begun = self.kept.get(client, {}), member.begun
        lost = [n for n, v in last.items() if n not in told and not (n in begun and torch.equal(begun[n], v))]
        if lost:
            self.problems.append(f"client {client} has not kept '{lost[0]}' from round to round")
        self.kept[client] = own_of(member)

    def _same(self, verb: str, client: int, expected: set[str], found: set[str]) -> None:
        if expected != found:
            self.problems.append(f"client {client} {verb} {len(found)} tensors instead of {len(expected)}")

    def _moved(self, update: Update, before: Mapping[str, torch.Tensor]) -> None:
        """Note down what moved in this round, by region and factor."""
        after = self.engine.memory[update.client] | S.pick(update.state, is_model)
        for name, key in self.engine.keys.items():
            if after[name].shape != before[name].shape or not torch.equal(after[name], before[name]):
                self.moved.add((key.region, key.factor))


@dataclass(frozen=True)
class Checked:
    """What a tiny run showed."""

    row: Row
    problems: list[str]


def check(name: str, model: str = "minisam", data: Dataset | None = None) -> Checked:
    """Run the row for two rounds and compare what travelled and what stayed with what it says.

    One more where clients keep notes: some have none before the second round, and then it is seen that they last.
    """
    engine, server = setting(name, model, data)
    witness, row = Witness(engine), engine.method
    if told := row.keeps_nothing(engine.keys, model):
        witness.problems.append(told)
    rounds = 3 if row.work.notes else 2
    args = (row, witness, server, engine.keys, rounds, engine.setting.budget.steps, lambda round: engine.clients)
    records = list(federate(*args, layers=engine.setting.layers))
    clients = len(engine.clients)
    layers, steps = engine.setting.layers, engine.setting.budget.steps
    said = {  # by region and factor: a single bias in front of a norm may well have no gradient
        (key.region, key.factor)
        for key in engine.keys.values()
        if moves_at_all(key, layers) and row.schedule.may_move(key, rounds, steps)
    }
    witness.problems += [f"no {factor} of {region} was trained" for region, factor in sorted(said - witness.moved)]
    witness.end()
    for record in records:
        witness.problems += record.refused
    second = records[1]
    assert second.bytes_up is not None and second.bytes_down is not None  # no row's own rule is silent
    up, down = second.bytes_up // clients, second.bytes_down // clients
    return Checked(describe(name, engine, up, down), witness.problems)


def table(names: Iterable[str], model: str = "minisam") -> Iterator[Checked]:
    """Every row, checked by its run: the words and the bytes come from there. About half a second a row."""
    torch.set_num_threads(1)
    data = load("phantom", size=32, sites=SITES, unseen=0, per_site=6, val=2, test=2)
    check_task(model, data.task)
    check_size(model, data.spatial)
    return (check(name, model, data=data) for name in names)
