"""Which tensors travel. Everything that is trained and not shared stays at its site, across rounds."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora_mini.adapters.base import Key


@dataclass(frozen=True)
class Sharing:
    """A predicate on one trained tensor, with the words that the method table prints."""

    label: str
    test: Callable[[Key], bool]

    def __call__(self, key: Key) -> bool:
        return self.test(key)


nothing = Sharing("nothing", lambda key: False)
everything = Sharing("everything", lambda key: True)
all_but_norms = Sharing("all but norms", lambda key: key.kind != "norm")


def factors(encoder: str, decoder: str, head: bool) -> Sharing:
    """Share factor `encoder` of encoder layers, factor `decoder` of decoder layers, and the head or not."""
    parts = [f"{encoder} everywhere"] if encoder == decoder else [f"{encoder} in encoder", f"{decoder} in decoder"]
    wanted = {"encoder": encoder, "decoder": decoder}

    def test(key: Key) -> bool:
        return head if key.region == "head" else key.factor == wanted[key.region]

    return Sharing(", ".join([*parts, "head"] if head else parts), test)
