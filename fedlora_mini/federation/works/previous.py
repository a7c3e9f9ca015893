"""A client that remembers the model it trained last, for objectives that compare with it."""

from dataclasses import dataclass

from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

PREVIOUS = "~previous/"


@dataclass(frozen=True)
class Remember(Work):
    """Keeps the end of every round as `~previous/…`."""

    notes = (PREVIOUS,)
    label = "remembers its last model"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        end, loss = client.fit(round)
        client.keep(PREVIOUS, end)
        return end, loss, {}
