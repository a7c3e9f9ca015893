"""agg_err = ||sum_k p_k ΔW_k - ΔW(after)||_F / ||sum_k p_k ΔW_k||_F: what a rule loses of the mean update."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedlora_mini.adapters.base import adapters, delta_of
from fedlora_mini.federation.aggregation.pairs import Pair, product_norm, stacked
from fedlora_mini.federation.exchange import Update
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.state import State


@torch.no_grad()
def aggregation_error(
    model: nn.Module, before: State, after: State, updates: Sequence[Update], private: Callable[[str], bool]
) -> float | None:
    """Over all adapted layers whose factors are common to all clients once the round is over.

    `before` and `after` are the server's states. ΔW(after) is that of its factors, plus `<path>.fold.B`
    `<path>.fold.A` where the rule changed W_0. For the mean of LoRA factors the numerator is ||Cov_p(B, A)||_F (methods
    card 1.2): 0 if one factor is equal on all clients. `private(name)` tells what stays at the sites: a layer with a
    private factor has no common ΔW, so it is left out. None if no layer is left, or nothing moved.

    Thin where ΔW is a product of thin factors, whose ranks may be unequal; otherwise by ΔW itself.
    """
    total = sum(u.weight for u in updates)
    weights = [u.weight / total for u in updates]
    own = {
        path: {f: f"{path}.{f}" for f, _ in adapter.named_parameters(recurse=False)}
        for path, adapter in adapters(model)
        if adapter.merges and not adapter.linear
    }
    names = [name for factors in own.values() for name in factors.values()]
    clients = [{n: u.state.get(n, before[n]).double() for n in names} for u in updates]
    new = {n: after[n].double() for n in names}
    fold = {n: after[key].double() for n in names if (key := ".fold.".join(n.rsplit(".", 1))) in after}
    thin, thin_new, thin_fold = [pairs(model, state) for state in clients], pairs(model, new), pairs(model, new | fold)
    lost = kept = 0.0
    for path, adapter in adapters(model):
        if path not in own or any(private(name) for name in own[path].values()):
            continue
        if path in thin_new:
            mean = [Pair(p, *client[path]) for p, client in zip(weights, thin, strict=True)]
            loss = [*mean, Pair(-1.0, *thin_new[path])]
            if f"{path}.A" in fold:
                loss.append(Pair(-1.0, *thin_fold[path]))
            lost += product_norm(*stacked(loss)) ** 2
            kept += product_norm(*stacked(mean)) ** 2
        else:
            *deltas, delta = [delta_of(adapter, {f: s[n] for f, n in own[path].items()}) for s in [*clients, new]]
            whole = torch.stack([p * each for p, each in zip(weights, deltas, strict=True)]).sum(0)
            lost += float((whole - delta).square().sum())
            kept += float(whole.square().sum())
    return (lost / kept) ** 0.5 if kept > 0 else None
