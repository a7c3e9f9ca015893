"""A small federation whose traffic and training a test can look at: what the tests of clients' works stand on."""

from dataclasses import replace

import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.adapters.features import embed
from fedlora_mini.data import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import METHODS, Budget, Server, federate
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build

BUDGET = Budget(steps=2, batch=2, lr=1e-2)
SGD = replace(BUDGET, optimiser="sgd", lr=0.1)


class Watched:
    """An engine that writes down what passes, and every local training: (client, round, start, end, budget steps)."""

    def __init__(self, engine):
        self.engine, self.clients, self.setting = engine, engine.clients, engine.setting
        self.members, self.requests, self.updates, self.fits = engine.members, [], [], []
        for member in self.members:
            member.fit = self.spy(member, member.fit)

    def spy(self, member, fit):
        def fitted(round, start=None, *args, **kwargs):
            begin = S.clone(member.tensors if start is None else start)
            end, loss = fit(round, start, *args, **kwargs)
            self.fits.append((member.number, round, begin, S.clone(end)))
            return end, loss

        return fitted

    def exchange(self, requests):
        self.requests.append(requests)
        self.updates.append([])
        for update in self.engine.exchange(requests):
            self.updates[-1].append(update)
            yield update

    def ends(self, round):
        """What training gave in a round, by client: the first fit of each."""
        return {client: end for client, t, _, end in reversed(self.fits) if t == round}

    def starts(self, round):
        return {client: begin for client, t, begin, _ in reversed(self.fits) if t == round}


class Normed(nn.Module):
    """A small network with a batch norm."""

    def __init__(self, classes):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def parts(data, sizes=(8, 4, 6)):
    """Sites of unequal size, at half the resolution."""
    return [Split(*half(s.train, n)) for s, n in zip(data.sites, sizes, strict=True)]


def half(split, n=None):
    return split.images[:n, :, ::2, ::2].contiguous(), split.masks[:n, ::2, ::2].contiguous()


def federation(row, splits, classes=6, budget=BUDGET, ranks=None, network=None, **options):
    row = METHODS[row] if isinstance(row, str) else row
    plain = build("minisam", classes, d=16, depth=1, stem=4, width=4) if network is None else network(classes)
    model = prepare(plain, row.adapter, **options)
    start = trainable(model)
    engine = LocalEngine(model, row, keys(model, list(start)), splits, budget, 0, "sequential", ranks=ranks)
    return Watched(engine), Server(S.clone(start), ranks=dict(ranks or {}))


def advance(watched, server, rounds, choose=None):
    """Up to so many rounds."""
    setting, everyone = watched.setting, choose or (lambda round: watched.clients)
    args = (setting.method, watched, server, setting.keys, rounds, setting.budget.steps, everyone)
    return list(federate(*args, layers=setting.layers))


def run(row, splits, rounds, **options):
    watched, server = federation(row, splits, **options)
    return watched, server, advance(watched, server, rounds)


def models(watched, server):
    """The server's model and every client's own."""
    return [S.pick(server.state, is_model), *(watched.engine.personal(k, server) for k in watched.clients)]


def gradient(model, state, x, y, extra=lambda leaves: 0.0):
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    value = segmentation_loss(call(model, leaves, x), y).mean() + extra(leaves)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def close(a, b, tolerance=1e-5):
    return S.norm(S.sub(a, b)) < tolerance * S.norm(b)


def squared(model, state, split):
    """Mean over images of the squared gradient of the pixel-mean cross-entropy."""
    total = {name: torch.zeros_like(value) for name, value in state.items()}
    for x, y in zip(split.images, split.masks, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        log_p = call(model, leaves, x[None])[0].log_softmax(0)
        value = -log_p.gather(0, y[None].long()).mean()
        for name, g in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            total[name] += g**2 / len(split)
    return total


def class_means(model, state, split, classes):
    """By a loop over voxels: means and counts."""
    z = embed(model, state, split.images)[1]
    at = [[z[n, :, i, j] for n, i, j in (split.masks == c).nonzero().tolist()] for c in range(classes)]
    means = torch.stack([torch.stack(rows).mean(0) if rows else torch.zeros(z.shape[1]) for rows in at])
    return means, torch.tensor([float(len(rows)) for rows in at])
