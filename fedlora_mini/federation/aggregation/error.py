"""agg_err = ||sum_k p_k ΔW_k - ΔW(after)||_F / ||sum_k p_k ΔW_k||_F: what a rule loses of the mean update."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters, delta_of
from fedlora_mini.federation.aggregation.pairs import Pair, product_norm, stacked
from fedlora_mini.federation.exchange import Update, received
from fedlora_mini.metrics.rank import pairs
from fedlora_mini.state import State

FEW = 16  # clients whose thin factors are held in any case, so that the products of few are never formed


class AggregationError:
    """The error of one round, from updates that pass one by one: `add` each, then ask for the `value`.

    Over all adapted layers whose factors are common to all clients once the round is over. `before` and `after` are the
    server's states. ΔW(after) is that of its factors, plus `<path>.fold.B` `<path>.fold.A` where the rule changed W_0.
    For the mean of LoRA factors the numerator is ||Cov_p(B, A)||_F (chapter 7): 0 if one factor is equal on all
    clients. `private(name)` tells what stays at the sites: a layer with a private factor has no common ΔW, so it is
    left out.

    Of a masked update, an entry that its client keeps stands at the server's start, as in `received`: ΔW_k is what the
    message makes of the server's model. So what `masked` does on purpose counts as well, as a server's momentum does:
    the mean over those who send an entry goes 1 / Σ p_k M_k times as far as the mean over all.

    Thin where ΔW is a product of thin factors, whose ranks may be unequal; otherwise by ΔW itself. The factors of more
    than FEW clients are added up in sum_k w_k ΔW_k as soon as they are larger than it: the memory does not grow with
    the number of clients.
    """

    def __init__(self, model: nn.Module, before: State, private: Callable[[str], bool]) -> None:
        self.model, self.total, self.layers = model, 0.0, dict(adapters(model))
        own = {
            path: {f: f"{path}.{f}" for f, _ in adapter.named_parameters(recurse=False)}
            for path, adapter in self.layers.items()
            if adapter.merges and not adapter.linear
        }
        self.own = {path: names for path, names in own.items() if not any(map(private, names.values()))}
        self.before = {name: before[name] for factors in self.own.values() for name in factors.values()}
        self.thin: dict[str, list[Pair]] = {path: [] for path in self.own}  # w_k, P_k, Q_k with ΔW_k = P_k Q_k
        self.sums: State = {}  # sum_k w_k ΔW_k of the clients that are not in `thin`

    @torch.no_grad()
    def add(self, update: Update) -> None:
        """Take one client's update in."""
        self.total += update.weight
        state = {name: value.double() for name, value in received(update.state, self.before).items()}
        thin = pairs(self.model, state) if self.own else {}
        for path in self.own:
            if path not in thin:
                self._sum(path, update.weight * self._delta(path, state))
                continue
            held = self.thin[path]
            held.append(Pair(update.weight, *thin[path]))
            m, n = len(held[0].B), held[0].A.shape[1]
            if len(held) > FEW and sum(len(A) for _, _, A in held) * (m + n) > m * n:
                self._sum(path, torch.matmul(*stacked(held)))
                held.clear()

    @torch.no_grad()
    def value(self, after: State) -> float | None:
        """The error of all that was added; None if no layer is left, or nothing moved."""
        new = {name: after[name].double() for name in self.before}
        fold = {n: after[key].double() for n in new if (key := ".fold.".join(n.rsplit(".", 1))) in after}
        thin_new, thin_fold = (pairs(self.model, state) if self.own else {} for state in (new, new | fold))
        lost = kept = 0.0
        for path in self.own:
            mean = [Pair(w / self.total, P, Q) for w, P, Q in self.thin[path]]
            made = [Pair(-1.0, *thin_new[path])] if path in thin_new else []
            made += [Pair(-1.0, *thin_fold[path])] if f"{path}.A" in fold else []
            if path in self.sums:
                whole = self.sums[path] / self.total
                whole = whole + torch.matmul(*stacked(mean)) if mean else whole
                less = torch.matmul(*stacked(made)) if made else -self._delta(path, new)
                lost += float((whole + less).square().sum())
                kept += float(whole.square().sum())
            elif mean:
                lost += product_norm(*stacked([*mean, *made])) ** 2
                kept += product_norm(*stacked(mean)) ** 2
        return (lost / kept) ** 0.5 if kept > 0 else None

    def _delta(self, path: str, state: State) -> Tensor:
        """ΔW of a layer whose update is no product of thin factors."""
        return delta_of(self.layers[path], {f: state[n] for f, n in self.own[path].items()})

    def _sum(self, path: str, term: Tensor) -> None:
        self.sums[path] = self.sums[path].add_(term) if path in self.sums else term


def aggregation_error(
    model: nn.Module, before: State, after: State, updates: Iterable[Update], private: Callable[[str], bool]
) -> float | None:
    """`AggregationError` of updates that are all there."""
    error = AggregationError(model, before, private)
    for update in updates:
        error.add(update)
    return error.value(after)
