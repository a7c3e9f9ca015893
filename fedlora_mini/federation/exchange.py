"""What travels between server and clients, and the server's memory."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

from fedlora_mini.state import State, finite

OWN = "~~"  # how the names of the server's own memory begin, such as momenta: they never travel
MASK = "~mask"  # ends the name of a message that says which entries of the tensor before it are sent
NOT_FINITE = "NaN or infinite values"  # why an update of a training that diverged is refused
BANK = "~bank/"  # messages that the server keeps apart by client, as "~bank/…/<client>", and passes on


def is_note(name: str) -> bool:
    """Whether it names a message or a memory instead of a model's tensor: it holds a "~"."""
    return "~" in name


def is_model(name: str) -> bool:
    """The opposite: a tensor that the network is called with."""
    return "~" not in name


@dataclass(frozen=True)
class Request:
    """Server to one client: the shared tensors that changed since it last took part."""

    round: int
    state: State


@dataclass(frozen=True)
class Update:
    """One client to the server: its shared tensors after local training, weighted by its number of training images."""

    client: int
    state: State
    weight: float
    loss: float = float("nan")  # mean over its local steps
    steps: int = 1  # local steps it took
    broken: bool = False  # whether training left the finite numbers, in what is sent or in what stays at the client


@dataclass
class Server:
    """`state` holds every trained tensor; one that is never shared stays at its common start.

    ranks: of clients that adapt with another rank than the server. products: what the last round folded into frozen
    weights, as thin factors; a client that missed a round gets the weights themselves.
    """

    state: State
    round: int = 0
    changed: dict[str, int] = field(default_factory=dict)  # round in which a tensor last changed; absent = 0
    seen: dict[int, int] = field(default_factory=dict)  # last round whose result a client has received; absent = 0
    ranks: dict[int, int] = field(default_factory=dict)
    products: State = field(default_factory=dict)

    def news(self, client: int) -> State:
        """The tensors that changed since `client` last heard of them."""
        last = self.seen.get(client, 0)
        new = [name for name, when in self.changed.items() if when > last and not name.startswith(OWN)]
        if last < self.round - 1 or not self.products:
            return {name: self.state[name] for name in new}
        return {name: self.state[name] for name in new if not name.endswith(".base.weight")} | self.products


Rule = Callable[[State, Iterable[Update]], State]
"""(the server's tensors of this round, the clients' updates in the order of clients) -> the new ones. Pure.

It may carry attributes: `label`, its words in the method table; `unequal`, whether clients may have other ranks;
`empty`, whether it has an answer for a round in which nobody was asked; `silent`, whether its answer is all that may be
told of the updates, and `clients`, if so, how many it expects; `fresh`, whether factors start anew in every
round, by its `seed`; `folds`, whether it changes frozen weights; `offer(news, state, client)`, what one client is told
instead.
"""


def refusal(update: Update, expected: State, messages: Iterable[str] = (), unequal: bool = False) -> str | None:
    """Why an update cannot be used, or None. Names, shapes and dtypes must be the expected ones; all numbers finite.

    messages: patterns of the notes that may come with it. unequal: the rank of a factor may be smaller.
    """
    tensors = {name: value for name, value in update.state.items() if is_model(name)}
    odd = sorted(tensors.keys() ^ expected.keys())
    notes = [n for n in update.state if is_note(n) and not any(fnmatch(n, pattern) for pattern in messages)]
    if notes:
        told = ", ".join(messages) or "none"
        return f"client {update.client}: note '{notes[0]}' is not among its work's `messages`; accepted: {told}"
    if odd:
        return f"client {update.client}: wrong names, {len(odd)} differ, first '{odd[0]}'"
    for name, value in tensors.items():
        wanted = expected[name]
        if value.shape != wanted.shape and not (unequal and _lower_rank(name, value.shape, wanted.shape)):
            return f"client {update.client}: '{name}' is {tuple(value.shape)}, expected {tuple(wanted.shape)}"
        if value.dtype != wanted.dtype:
            return f"client {update.client}: '{name}' is {value.dtype}, expected {wanted.dtype}"
    if update.broken or not finite(update.state):
        return f"client {update.client}: {NOT_FINITE}"
    if not 0 < update.weight < math.inf:
        return f"client {update.client}: weight {update.weight} is not positive and finite"
    return None


def _lower_rank(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether it is a factor with fewer directions than the server's."""
    axis = {"A": 0, "B": 1}.get(name.rpartition(".")[2])
    if axis is None or len(shape) != len(wanted) or not 1 <= shape[axis] <= wanted[axis]:
        return False
    return shape[1 - axis] == wanted[1 - axis]


def received(sent: Mapping[str, Tensor], start: State) -> State:
    """M θ + (1 - M) θ_0: the tensors of `start` with what was sent in their place; M = 1 where no mask came along.

    An entry that its client keeps is no zero, whatever fills its place in the message: nothing is known of it.
    """
    masks = {name: sent[name + MASK].bool() for name in start if name + MASK in sent}
    given = {name: sent.get(name, value) for name, value in start.items()}
    return {n: torch.where(masks[n], v, start[n]) if n in masks else v for n, v in given.items()}


def by_client(update: Update) -> State:
    """The messages that the server keeps apart, with the client in their names."""
    return {f"{name}/{update.client}": value for name, value in update.state.items() if name.startswith(BANK)}


def wire_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes on the wire, without names. A tensor with a mask travels as its bits and the entries that it lets pass."""
    total = 0
    for name, value in state.items():
        mask = state.get(f"{name}{MASK}")
        if name.endswith(MASK):
            total += -(-value.numel() // 8)
        else:
            total += (value.numel() if mask is None else int(mask.sum())) * value.element_size()
    return total
