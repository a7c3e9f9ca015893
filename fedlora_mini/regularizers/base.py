"""What a method adds to the task loss, or does to the gradients, the forward pass or the result of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora_mini.adapters.base import Adapter, Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State


def _cannot() -> State:
    raise FedloraError("gradients can be taken again only where clients train one after the other")


def _no_model(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    raise FedloraError("there is no network in this context")


EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Context:
    """What a regulariser may look at besides the client's current state."""

    round: int
    step: int  # from 1
    start: State  # the client's state at the start of the round, detached
    keys: dict[str, Key]
    lr: float  # of this step
    steps: int = 1  # local steps of the round
    pace: float = 1.0  # lr of this step / the budget's lr, by the schedule
    layers: Mapping[str, Adapter] = field(default_factory=dict)  # path -> adapter, for its frozen layer and settings
    moves: frozenset[str] = frozenset()  # names that move at this step; what stands still keeps its bits
    index: int | None = None  # the client's place on the group axis; None where clients train one after the other
    memory: dict[str, Any] = field(default_factory=dict)  # its own, kept from step to step within a round
    restart: set[str] = field(default_factory=set)  # names put in here: the optimiser forgets its moments of them
    again: Callable[[], State] = _cannot  # the gradients on the same batch at the state as it is now
    kept: Mapping[str, Tensor] = field(default_factory=dict)  # the client's notes (`federation.exchange.is_note`)
    x: Tensor = EMPTY  # this step's images and masks, of this client alone
    y: Tensor = EMPTY
    z: Tensor = EMPTY  # the head's input on x at the state as it is, for terms that ask for `features`
    run: Callable[[State, Tensor], tuple[Tensor, Tensor]] = _no_model  # (another state, x) -> logits and z

    def of(self, factor: str, state: Mapping[str, Tensor]) -> list[str]:
        """Names in `state` whose role is `factor`."""
        return [name for name in state if name in self.keys and self.keys[name].factor == factor]


IMAGES = ("x", "y", "z", "again", "run")  # what of a context is made of images


class Blind(Context):
    """What a term that calls itself `free` sees under privacy: reading what is made of images raises, and names it."""

    label: str

    def __init__(self, context: Context, label: str) -> None:
        self.__dict__.update({name: value for name, value in vars(context).items() if name not in IMAGES}, label=label)

    def __getattribute__(self, name: str) -> Any:
        if name in IMAGES:
            told = f"'{self.label}' calls itself free, and reads images by context.{name}"
            raise FedloraError(f"{told}: under privacy nothing does beside the private gradient")
        return super().__getattribute__(name)


class Regularizer:
    """All hooks see ONE client's state; with several clients in one pass they are called for each in turn.

    A step is: batch -> images -> view -> forward -> loss + penalty -> backward -> gradient_ -> optimiser -> prox_.
    """

    label: str = ""
    grouped: bool = True  # whether it may be used while clients train along the group axis
    features: bool = False  # whether it reads `context.z`
    reads: tuple[str, ...] = ()  # notes without which `images` is not the one that the client trained with
    free: bool = False  # reads no image, only the released gradient and the state: costs no privacy (see `Blind`)

    def batch(self, x: Tensor, y: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Other images, or more of them, for this step's training."""
        return x, y

    def images(self, x: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """What the network is given for images x, in training and afterwards, by the client's notes."""
        return x

    def view(self, state: State, context: Context) -> State:
        """Further tensors that the forward pass of this step shall see, by name, such as a perturbed frozen weight."""
        return {}

    def penalty(self, state: State, context: Context) -> Tensor | float:
        """Smooth: added to the loss."""
        return 0.0

    def gradient_(self, gradient: State, state: State, context: Context) -> None:
        """Changes the gradient before the optimiser sees it. A name taken out is left alone by the optimiser."""

    def prox_(self, state: State, context: Context) -> None:
        """Non-smooth: changes `state` in place after the optimiser's step."""
