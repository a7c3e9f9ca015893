"""What clients say beside their tensors: a name with a "~" in an update is a message, and no tensor of the model."""

from torch import Tensor

from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.exchange import Update

WEIGHT = "~weight"  # a scalar: how much the client wants to count
PROTOTYPE, COUNT = "~prototype", "~count"  # (C, c), (C,): the mean feature of every class, over so many samples


def message(update: Update, name: str) -> Tensor:
    """One message of a client. Raises if it did not send it."""
    if name not in update.state:
        raise FedloraError(f"client {update.client} sent no '{name}', which the rule reads")
    return update.state[name]
