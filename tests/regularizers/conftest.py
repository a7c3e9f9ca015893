"""A tiny network with one kind of adapter, and local training on discs: what the companions are tried on."""

import pytest
import torch

from fedlora_mini.adapters.base import freeze, inject, keys, region, trainable
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.schedule import together
from fedlora_mini.federation.sharing import everything
from fedlora_mini.models import build


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batch(client, step, dtype, n=2, side=16):
    """Bright discs on noise, another batch for every client and step."""
    g = torch.Generator().manual_seed(1000 * client + step)
    x = torch.rand(n, 3, side, side, generator=g) * 0.3
    grid, centre = torch.arange(side), torch.randint(4, side - 4, (n, 2, 1, 1), generator=g)
    y = ((grid[:, None] - centre[:, 0]) ** 2 + (grid[None] - centre[:, 1]) ** 2 < 12).to(torch.uint8)
    return (x + 0.5 * y[:, None]).to(dtype), y


@pytest.fixture
def adapted():
    """(adapter class, options) -> a frozen network with it on every layer but the head: linear, conv and transposed."""

    def make(wrap, dtype=torch.float32, noise=0.0, **options):
        model = freeze(build("minisam", 2, d=16, depth=1, stem=4, width=4)).to(dtype)

        def body(path, module):
            return isinstance(module, LAYERS) and region(model, path) != "head"

        inject(model, lambda layer, rng: wrap(layer, generator=rng, **options), body)
        if noise:  # away from the start, where half of the gradients are zero
            g = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in (p for p in model.parameters() if p.requires_grad):
                    p += noise * torch.randn(p.shape, generator=g).to(dtype)
        return model

    return make


@pytest.fixture
def fit():
    """(model, terms) -> the clients' end states after local training, one after the other or in one pass."""

    def run(model, *terms, clients=1, grouped=False, round=1, start=None, schedule=together, **budget):
        start = trainable(model) if start is None else start
        table = keys(model, list(start))
        method = Method("", "lora", everything, schedule, objective=terms)
        dtype = next(iter(start.values())).dtype
        size = Budget(**{"steps": 6, "batch": 2, "lr": 1e-2} | budget)

        def local(members):
            def batches(step):
                parts = [batch(client, (round - 1) * size.steps + step, dtype) for client in members]
                return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

            return train(model, method, table, [start] * len(members), batches, size, round)[0]

        if grouped:
            return local(range(clients))
        return [state for client in range(clients) for state in local([client])]

    return run
