"""v_k <- argmin F_k(v) + (lam/2) ||v - w||²: a personal model beside the global one. Ditto, Li et al. 2021."""

from dataclasses import dataclass

from fedlora_mini.accepted import ranges
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.regularizers import Anchor
from fedlora_mini.state import State

PERSONAL = "~personal/"


@dataclass(frozen=True)
class Ditto(Work):
    """First FedAvg's step on w, which is sent, then as many steps on v, which stays, pulled to the w that came in."""

    lam: float = 0.1

    notes = personal_notes = (PERSONAL,)

    def __post_init__(self) -> None:
        ranges(self, lam="[0, inf)")

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"global and personal model, lam {self.lam:g}"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        w = {name: value.clone() for name, value in client.tensors.items()}
        end, loss = client.fit(round)
        v = client.recall(PERSONAL) or w
        own, _ = client.fit(round, v, "personal", objective=(*client.setting.method.objective, Anchor(self.lam, w)))
        client.keep(PERSONAL, own)
        return end, loss, {}

    def personal(self, state: State, client: Member) -> State:
        return state | client.recall(PERSONAL)
