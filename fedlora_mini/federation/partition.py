"""How images are dealt to clients: as they come (one site, one client), or by a Dirichlet draw over a label."""

from dataclasses import replace

import torch
from torch import Tensor

from fedlora_mini.data.base import Dataset, Site, Split
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.federation.sampling import generator

LEAST = 10


def dirichlet(labels: Tensor, clients: int, alpha: float, rng: torch.Generator, least: int = 1) -> list[Tensor]:
    """Per label value, client shares ~ Dir(alpha, …, alpha): small alpha = each client sees few labels.

    labels (N,) of integers -> one index tensor per client, a partition of 0..N-1. Redraws until every client has at
    least `least` samples. Hsu et al. 2019.
    """
    if clients < 1 or alpha <= 0 or len(labels) < clients * least:
        raise FedloraError(
            f"cannot deal {len(labels)} samples to {clients} clients with at least {least} each at alpha {alpha:g}"
        )
    for _ in range(1000):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for value in labels.unique():
            rows = (labels == value).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=rng)]
            gamma = torch._standard_gamma(torch.full((clients,), alpha, dtype=torch.float64), generator=rng)
            ends = (gamma.cumsum(0) / gamma.sum() * len(rows)).round().long().tolist()
            for part, low, high in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part.append(rows[low:high])
        dealt = [torch.cat(part).sort().values for part in parts]
        if min(map(len, dealt)) >= least:
            return dealt
    raise FedloraError(f"no Dirichlet draw with alpha {alpha:g} gave each of {clients} clients {least} samples")


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

    Train, validation and test images are dealt separately, so that none changes its part. `by`: "site" (origin),
    "foreground" (quartile of the foreground share), or "label" where an image has one. By label only training images
    are dealt unevenly, at least LEAST to a client: all clients have to tell all classes apart.
    """
    dealt = {}
    for part in ("train", "val", "test"):
        everything = Split.concat([getattr(site, part) for site in dataset.sites])
        rng = generator(seed, part, "dirichlet")
        if by == "label" and part != "train":
            rows = [torch.arange(k, len(everything), clients) for k in range(clients)]
        else:
            rows = dirichlet(_labels(dataset, part, by), clients, alpha, rng, LEAST if by == "label" else 1)
        dealt[part] = [Split(everything.images[r], everything.masks[r]) for r in rows]
    record = {"partition": "dirichlet", "alpha": alpha, "by": by, "seed": seed}
    sites = tuple(
        Site(f"client{k}", dealt["train"][k], dealt["val"][k], dealt["test"][k], record) for k in range(clients)
    )
    return replace(
        dataset, sites=sites, note=f"{dataset.note} Dealt to {clients} clients, Dirichlet {alpha:g}.".strip()
    )
