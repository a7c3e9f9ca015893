"""agg_err = ||sum_k p_k ΔW_k - ΔW(mean of factors)||_F / ||sum_k p_k ΔW_k||_F: what averaging factors loses."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedlora_mini.adapters.base import adapters, delta_of
from fedlora_mini.federation.exchange import Update
from fedlora_mini.state import State


def aggregation_error(
    model: nn.Module, before: State, after: State, updates: Sequence[Update], private: Callable[[str], bool]
) -> float | None:
    """Over all adapted layers whose factors are common to all clients once the round is over.

    For LoRA the numerator is ||Cov_p(B, A)||_F (methods card 1.2): 0 if one factor is equal on all clients.
    `before` and `after` are the server's states, `private(name)` tells what stays at the sites: a layer with a private
    factor has no common ΔW, so it is left out. None if no layer is left, or nothing moved.
    """
    total = sum(u.weight for u in updates)
    numerator = denominator = 0.0
    for path, adapter in adapters(model):
        names = {factor: f"{path}.{factor}" for factor, _ in adapter.named_parameters(recurse=False)}
        if adapter.linear or not adapter.merges or any(private(name) for name in names.values()):
            continue
        clients = {f: torch.stack([u.state.get(n, before[n]) for u in updates]).double() for f, n in names.items()}
        weights = next(iter(clients.values())).new_tensor([u.weight / total for u in updates])
        mean_of_products = torch.tensordot(weights, delta_of(adapter, clients), 1)
        product_of_means = delta_of(adapter, {f: after[n].double() for f, n in names.items()})
        numerator += float((mean_of_products - product_of_means).square().sum())
        denominator += float(mean_of_products.square().sum())
    return (numerator / denominator) ** 0.5 if denominator > 0 else None
