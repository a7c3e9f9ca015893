"""Who takes part, and which images a client sees. Every generator is seeded by (seed, round, client, purpose).

Where a draw has to be secret it has no generator (None), and its coins come from the operating system.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedlora_mini.chance import coins, seeded
from fedlora_mini.errors import FedloraError


def generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone: generator(seed, round, client, "batches")."""
    return seeded("|".join(map(str, key)))


@contextmanager
def drawing(device: torch.device, *key: object) -> Iterator[None]:
    """What layers draw by themselves, such as dropout, follows the key; PyTorch's own generators end as they were."""
    seed, cuda = generator(*key).initial_seed(), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def participants(clients: Sequence[int], fraction: float, seed: int, round: int) -> list[int]:
    """max(1, round(fraction * K)) of the clients, without replacement, sorted."""
    _check(fraction)
    size = max(1, int(fraction * len(clients) + 0.5))
    order = torch.randperm(len(clients), generator=generator(seed, round, "participants"))
    return sorted(clients[i] for i in order[:size].tolist())


def drawn(clients: Sequence[int], fraction: float, seed: int | None, round: int) -> list[int]:
    """A Poisson sample: each with probability `fraction`, by a coin of its own; nobody now and then.

    seed: None takes the operating system's coins, other ones at every call.
    """
    _check(fraction)
    rng = None if seed is None else generator(seed, round, "participants")
    chosen = coins(len(clients), fraction, rng).tolist()
    return sorted(client for client, taken in zip(clients, chosen, strict=True) if taken)


def _check(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise FedloraError(f"the participation fraction must be in (0, 1], got {fraction}")


def batch_indices(n: int, batch: int, steps: int, rng: torch.Generator) -> Tensor:
    """(steps, batch) indices into n images: shuffled passes laid end to end, so that every batch is full."""
    passes = -(-batch * steps // n)
    return torch.cat([torch.randperm(n, generator=rng) for _ in range(passes)])[: batch * steps].view(steps, batch)


def flips(images: Tensor, masks: Tensor, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Mirror the whole batch along each spatial axis with probability 1/2 per sample."""
    for axis in range(1, masks.dim()):
        chosen = coins(len(masks), 0.5, rng, torch.float32).to(masks.device)
        where = chosen.view(-1, *(1,) * (masks.dim() - 1))
        images = torch.where(where.unsqueeze(1), images.flip(axis + 1), images)
        masks = torch.where(where, masks.flip(axis), masks)
    return images, masks
