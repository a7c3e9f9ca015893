"""LC-Fed, Wang et al. 2022: clients show each other their heads, and calibrate where these disagree.

The head stays personal; a copy of its D and d goes to the server, which passes all copies on. The client finds them as
D_rest and d_rest of its head's adapter (`adapters.calibrated`), and its one-hot vector in every `site`.
"""

from dataclasses import dataclass

import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.exchange import BANK
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

HEADS = f"{BANK}head/"


@dataclass(frozen=True)
class Calibrated(Work):
    """Until heads have come, all are the base's."""

    messages = (f"{HEADS}*",)
    label = "shows its head to all"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        client.memory |= self.received(client)
        end, loss = client.fit(round)
        heads = {n: v for n, v in end.items() if f"{n}_rest" in end}
        return end, loss, {f"{HEADS}{name}": value for name, value in heads.items()}

    def received(self, client: Member) -> State:
        """`site`, D_rest and d_rest as the client's own tensors."""
        out = {}
        for name, value in client.tensors.items():
            if name.endswith(".site"):
                if client.number >= len(value):
                    raise FedloraError(f"the adapter tells {len(value)} sites apart, there is a client {client.number}")
                out[name] = torch.nn.functional.one_hot(torch.tensor(client.number), len(value)).to(value)
        for name, value in client.recall(HEADS).items():
            factor, _, number = name.rpartition("/")
            rest = out.get(f"{factor}_rest", client.memory[f"{factor}_rest"]).clone()
            rest[int(number)] = value
            out[f"{factor}_rest"] = rest
        return out
