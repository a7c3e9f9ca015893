"""THE TABLE: a federated method is a row, a choice along the axes adapter, sharing, schedule, rule, objective, clients.

Each row differs from its neighbours in the cell that its paper is about.
"""

from dataclasses import dataclass

from fedlora_mini.errors import unknown
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.exchange import Rule
from fedlora_mini.federation.schedule import Schedule, by_round, only, together
from fedlora_mini.federation.sharing import Sharing, all_but_norms, everything, factors, nothing
from fedlora_mini.regularizers import Anchor, Regularizer


@dataclass(frozen=True)
class Method:
    """One row. `pooled` is the client axis: one client that holds all sites' data instead of one client per site."""

    title: str
    adapter: str  # a row of `adapters.registry.ADAPTERS`
    shared: Sharing
    schedule: Schedule = together
    rule: Rule = mean
    objective: tuple[Regularizer, ...] = ()
    pooled: bool = False
    reference: str = ""  # citation key of the book


METHODS: dict[str, Method] = {
    # anchors: what a federation has to beat, and what it cannot have
    "local": Method("local only", "lora", nothing),
    "pooled": Method("pooled data", "lora", everything, pooled=True),
    # full weights
    "fedavg": Method("FedAvg", "full", everything, reference="mcmahan2017fedavg"),
    "fedbn": Method("FedBN", "full", all_but_norms, reference="li2021fedbn"),
    # low-rank, one model for all
    "fedit": Method("FedIT", "lora", everything, reference="zhang2024fedit"),
    "fedprox": Method("FedIT + FedProx", "lora", everything, objective=(Anchor(0.01),), reference="li2020fedprox"),
    "ffa": Method("FFA-LoRA", "lora", everything, only("B"), reference="sun2024ffalora"),
    "rolora": Method("RoLoRA", "lora", everything, by_round("B", "A"), reference="chen2024rolora"),
    # low-rank, personal: which factor stays at the site
    "fedsa": Method("FedSA-LoRA", "lora", factors("A", "A", head=False), reference="guo2025fedsa"),
    "inverse_fedsa": Method("inverse FedSA", "lora", factors("B", "B", head=False)),
    "iat": Method("IAT sharing", "lora", factors("B", "A", head=True), reference="zhao2026iat"),
    "anti_iat": Method("anti-IAT (control)", "lora", factors("A", "B", head=True)),
}


def method(name: str) -> Method:
    """The row of that name."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
