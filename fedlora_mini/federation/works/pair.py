"""A client that goes on from its own A and B: the server passes them on to others and never back. FedALT, 2026."""

from dataclasses import dataclass

from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.federation.works.prune import pairs
from fedlora_mini.state import State

PAIR = "~pair/"


@dataclass(frozen=True)
class OwnPair(Work):
    """For rules that take a client's pair and offer it something else (`aggregation.others`)."""

    notes = personal_notes = (PAIR,)
    label = "goes on from its own A and B"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        end, loss = client.fit(round, client.tensors | client.recall(PAIR))
        client.keep(PAIR, pairs(end))
        return end, loss, {}

    def personal(self, state: State, client: Member) -> State:
        return state | client.recall(PAIR)
