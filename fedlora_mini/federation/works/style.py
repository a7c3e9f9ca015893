"""A client that tells the mean amplitude spectrum of its images: a style without any image's phase."""

from dataclasses import dataclass

from fedlora_mini.accepted import ranges
from fedlora_mini.data.spectral import low_frequencies
from fedlora_mini.federation.exchange import BANK
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State

AMPLITUDE = "~amplitude"
STYLES, MINE = f"{BANK}style", "~style"


@dataclass(frozen=True)
class Style(Work):
    """bank=True: told once, and the server passes it on (FedDG); False: told every round, for their mean (HarmoFL).

    A client takes its own amplitude out of the bank that comes back: the others' are the styles of its episodes.
    Outside the window of `ratio`, which nobody reads, nothing is told.
    """

    bank: bool = False
    ratio: float = 0.05

    def __post_init__(self) -> None:
        ranges(self, ratio="[0, 0.5]")

    @property
    def messages(self) -> tuple[str, ...]:  # type: ignore[override]
        return (STYLES,) if self.bank else (AMPLITUDE,)

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (MINE,) if self.bank else ()

    @property
    def label(self) -> str:  # type: ignore[override]
        return "tells its low mean amplitudes" + (", kept apart by client" if self.bank else "")

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        known = client.memory.pop(f"{STYLES}/{client.number}", None)
        if known is not None:
            client.memory[MINE] = known
        end, loss = client.fit(round)
        amplitude = low_frequencies(client.data.images, self.ratio)
        if self.bank:
            return end, loss, {} if MINE in client.memory else {STYLES: amplitude}
        return end, loss, {AMPLITUDE: amplitude}
