"""Which tensors travel. Everything that is trained and not shared stays at its site, across rounds."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora_mini.adapters.base import Key


@dataclass(frozen=True)
class Sharing:
    """A predicate on one trained tensor, with the words that the method table prints.

    needs: what a network must have so that something stays; empty where every network has it, or nothing should stay.
    named: (region, factor) of what the words name, which an adapter may not have.
    """

    label: str
    test: Callable[[Key], bool]
    needs: str = ""
    named: tuple[tuple[str, str], ...] = ()

    def __call__(self, key: Key) -> bool:
        return self.test(key)


nothing = Sharing("nothing", lambda key: False)
everything = Sharing("everything", lambda key: True)
all_but_norms = Sharing("all but norms", lambda key: key.kind != "norm", "norms with weights or statistics")
all_but_head = Sharing("all but the head", lambda key: key.region != "head")
encoder_only = Sharing("the encoder", lambda key: key.region == "encoder")
decoder_only = Sharing("the decoder and head", lambda key: key.region != "encoder")


def common(head: bool = True, without: tuple[str, ...] = ("router", "site", "mix")) -> Sharing:
    """Everything but what belongs to a client by its name: factors `…_own`, `…_rest`, and those in `without`."""

    def test(key: Key) -> bool:
        own = key.factor.endswith(("_own", "_rest")) or key.factor in without
        return not own and (head or key.region != "head")

    return Sharing("common factors" + (", head" if head else ""), test)


def factors(encoder: str, decoder: str, head: bool) -> Sharing:
    """Share factor `encoder` of encoder layers, factor `decoder` of decoder layers, and the head or not."""
    parts = [f"{encoder} everywhere"] if encoder == decoder else [f"{encoder} in encoder", f"{decoder} in decoder"]
    wanted = {"encoder": encoder, "decoder": decoder}

    def test(key: Key) -> bool:
        return head if key.region == "head" else key.factor == wanted[key.region]

    return Sharing(", ".join([*parts, "head"] if head else parts), test, named=tuple(wanted.items()))
