"""How images are dealt to clients: as they come (one site, one client), or by a Dirichlet draw over a label."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.sampling import generator

LEAST = {"train": 10, "val": 4, "test": 4}  # images of a client


def dirichlet(labels: Tensor, clients: int, alpha: float, rng: torch.Generator, least: int = 1) -> list[Tensor]:
    """Per label value, client shares ~ Dir(alpha, …, alpha): small alpha = each client sees few labels.

    labels (N,) of integers -> one index tensor per client, a partition of 0..N-1. Redraws until every client has at
    least `least` samples. Raises where samples are too few for that, or a thousand draws fail. Hsu et al. 2019.
    """
    return mixtures({"samples": labels}, clients, alpha, rng, {"samples": least})["samples"]


def mixtures(
    labels: Mapping[str, Tensor], clients: int, alpha: float, rng: torch.Generator, least: Mapping[str, int]
) -> dict[str, list[Tensor]]:
    """The same of several parts at once: a client has one share of a label value in all of them, up to rounding.

    Raises what `dirichlet` does.
    """
    for part, own in labels.items():
        if clients < 1 or alpha <= 0 or len(own) < clients * least[part]:
            each = f"at least {least[part]} each at alpha {alpha:g}"
            raise FedloraError(f"cannot deal {len(own)} {part} to {clients} clients with {each}")
    values = torch.cat(list(labels.values())).unique()
    for _ in range(1000):
        dealt: dict[str, list[list[Tensor]]] = {part: [[] for _ in range(clients)] for part in labels}
        for value in values:
            rows = {part: (own == value).nonzero().flatten() for part, own in labels.items()}
            rows = {part: r[torch.randperm(len(r), generator=rng)] for part, r in rows.items()}
            gamma = torch._standard_gamma(torch.full((clients,), alpha, dtype=torch.float64), generator=rng)
            for part, r in rows.items():
                ends = (gamma.cumsum(0) / gamma.sum() * len(r)).round().long().tolist()
                for mine, low, high in zip(dealt[part], [0, *ends[:-1]], ends, strict=True):
                    mine.append(r[low:high])
        found = {part: [torch.cat(mine).sort().values for mine in each] for part, each in dealt.items()}
        if all(min(map(len, found[part])) >= least[part] for part in labels):
            return found
    told = ", ".join(f"{count} {part}" for part, count in least.items())
    raise FedloraError(f"no Dirichlet draw with alpha {alpha:g} gave each of {clients} clients {told}")


def _labels(dataset: Dataset, part: str, by: str) -> Tensor:
    splits = [getattr(site, part) for site in dataset.sites]
    if by == "label":
        if not dataset.sites[0].train.labelled:
            raise FedloraError(f"'{dataset.name}' has a label for every pixel and cannot be dealt by label")
        return torch.cat([split.masks for split in splits])
    if by == "site":
        return torch.cat([torch.full((len(split),), k) for k, split in enumerate(splits)])
    if by == "foreground":
        share = torch.cat([(s.masks > 0).flatten(1).float().mean(1) for s in splits])
        return torch.bucketize(share, share.quantile(torch.tensor([0.25, 0.5, 0.75])))
    raise unknown("partition label", by, ("site", "foreground", "label"))


def repartition(dataset: Dataset, clients: int, alpha: float, seed: int = 0, by: str = "site") -> Dataset:
    """A data set whose sites are `clients` Dirichlet mixtures of the original ones.

    No image changes its part. `by`: "site" (origin), "foreground" (quartile of the foreground share), or "label" where
    an image has one. A client's validation and test images are the mixture that its training images are; by label they
    are dealt evenly, since all clients have to tell all classes apart. LEAST is what a client has of each part, or half
    of an even share where that is less. Raises what `dirichlet` does, and for an unknown `by` or one without labels.
    """
    every = {part: Split.concat([getattr(site, part) for site in dataset.sites]) for part in LEAST}
    labels = {part: _labels(dataset, part, by) for part in LEAST}
    rng = generator(seed, "train", "dirichlet")
    if by == "label":
        rows = {part: [torch.arange(k, len(own), clients) for k in range(clients)] for part, own in every.items()}
        rows["train"] = dirichlet(labels["train"], clients, alpha, rng, LEAST["train"])
    else:
        half = {part: len(own) // (2 * max(clients, 1)) for part, own in every.items()}
        rows = mixtures(labels, clients, alpha, rng, {part: min(n, max(half[part], 1)) for part, n in LEAST.items()})
    dealt = {part: [Split(own.images[r], own.masks[r]) for r in rows[part]] for part, own in every.items()}
    record = {"partition": "dirichlet", "alpha": alpha, "by": by, "seed": seed}
    sites = tuple(
        Site(f"client{k}", dealt["train"][k], dealt["val"][k], dealt["test"][k], record) for k in range(clients)
    )
    return replace(
        dataset, sites=sites, note=f"{dataset.note} Dealt to {clients} clients, Dirichlet {alpha:g}.".strip()
    )
