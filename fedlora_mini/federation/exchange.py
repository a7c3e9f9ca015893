"""What travels between server and clients, and the server's memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedlora_mini.state import State, finite


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


@dataclass
class Server:
    """`state` holds every trained tensor; one that is never shared stays at its common start."""

    state: State
    round: int = 0
    changed: dict[str, int] = field(default_factory=dict)  # round in which a tensor last changed; absent = 0
    seen: dict[int, int] = field(default_factory=dict)  # last round whose result a client has received; absent = 0

    def news(self, client: int) -> State:
        """The tensors that changed since `client` last heard of them."""
        last = self.seen.get(client, 0)
        return {name: self.state[name] for name, when in self.changed.items() if when > last}


Rule = Callable[[State, Sequence[Update]], State]
"""(the server's tensors of this round, the clients' updates sorted by client) -> the new ones. Pure."""


def refusal(update: Update, expected: State) -> str | None:
    """Why an update cannot be used, or None. Names, shapes and dtypes must be the expected ones; all numbers finite."""
    if update.state.keys() != expected.keys():
        odd = sorted(update.state.keys() ^ expected.keys())
        return f"client {update.client}: wrong names, {len(odd)} differ, first '{odd[0]}'"
    for name, value in update.state.items():
        if value.shape != expected[name].shape:
            return f"client {update.client}: '{name}' is {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        if value.dtype != expected[name].dtype:
            return f"client {update.client}: '{name}' is {value.dtype}, expected {expected[name].dtype}"
    if not finite(update.state):
        return f"client {update.client}: NaN or infinite values"
    if not update.weight > 0:
        return f"client {update.client}: weight {update.weight} is not positive"
    return None
