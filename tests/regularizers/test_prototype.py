"""Class means near the server's prototypes: the distance by a loop, and which classes it looks at."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.features import embed
from fedlora_mini.data import IGNORE
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import everything
from fedlora_mini.models import build
from fedlora_mini.regularizers import Context
from fedlora_mini.regularizers.prototype import NearPrototypes


def setting(classes=3):
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 5, 3, generator=rng).double()
    y = torch.randint(0, classes, (2, 5, 3), generator=rng).to(torch.uint8)
    y[:, 0] = IGNORE
    return z, y, torch.randn(classes, 4, generator=rng).double()


def context(z, y, common=None):
    return Context(2, 1, {}, {}, 0.1, kept={} if common is None else {"~prototype": common}, y=y, z=z)


def by_voxel(z, y, common, classes):
    """The mean over `classes` of the mean over channels of the squared distance."""
    total = 0.0
    for c in classes:
        rows = [z[n, :, i, j] for n in range(2) for i in range(5) for j in range(3) if y[n, i, j] == c]
        total += sum(float(((torch.stack(rows).mean(0) - common[c])[k]) ** 2) for k in range(4)) / 4
    return total / len(classes)


def test_the_value_is_the_mean_distance_of_the_classes():
    z, y, common = setting()
    found = NearPrototypes(0.7).penalty({}, context(z, y, common))
    assert float(found) == pytest.approx(0.7 * by_voxel(z, y, common, [0, 1, 2]), rel=1e-10)


def test_classes_that_the_batch_or_the_server_does_not_know_are_left_out():
    z, y, common = setting()
    y[y == 1], common[2] = 0, 0
    found = NearPrototypes().penalty({}, context(z, y, common))
    assert float(found) == pytest.approx(by_voxel(z, y, common, [0]), rel=1e-10)
    assert float(NearPrototypes().penalty({}, context(z, torch.full_like(y, IGNORE), common))) == 0.0


def test_before_the_server_has_sent_any_it_is_nothing():
    z, y, _ = setting()
    assert NearPrototypes().penalty({}, context(z, y)) == 0.0


def test_its_gradient_pulls_the_class_means_to_the_prototypes():
    z, y, common = setting()
    z.requires_grad_()
    [g] = torch.autograd.grad(NearPrototypes().penalty({}, context(z, y, common)), [z])
    assert not g[:, :, 0].any()  # where nobody judges
    with torch.no_grad():
        assert by_voxel(z - 10 * g, y, common, [0, 1, 2]) < by_voxel(z, y, common, [0, 1, 2])


def test_training_with_it_ends_nearer_and_clients_in_one_pass_like_one_after_the_other():
    model = prepare(build("minisam", 3, d=16, depth=1, stem=4, width=4), "lora").double()
    start = trainable(model)
    rng = torch.Generator().manual_seed(4)
    x = torch.rand(4, 3, 16, 16, generator=rng).double()
    y = (x[:, 0] * 3).to(torch.uint8)
    kept = [{"~prototype": torch.randn(3, 4, generator=rng).double()} for _ in range(2)]

    def fit(lam, clients):
        method = Method("", "lora", everything, objective=(NearPrototypes(lam),))
        rows = [slice(2 * k, 2 * k + 2) for k in clients]
        parts = torch.cat([x[r] for r in rows]), torch.cat([y[r] for r in rows])
        table, starts = keys(model, list(start)), [start] * len(clients)
        budget = Budget(10, 2, 1e-2)
        return train(model, method, table, starts, lambda step: parts, budget, 2, kept=[kept[k] for k in clients])[0]

    def distance(state, k):
        z, own = embed(model, state, x[2 * k : 2 * k + 2])[1], y[2 * k : 2 * k + 2]
        means = torch.stack([z.movedim(1, -1)[own == c].mean(0) for c in range(3)])
        return float((means - kept[k]["~prototype"]).square().mean())

    together = fit(10.0, [0, 1])
    for k, end in enumerate(together):
        [alone], [without] = fit(10.0, [k]), fit(0.0, [k])
        assert S.norm(S.sub(end, alone)) < 1e-8 * S.norm(alone)
        assert distance(end, k) < 0.9 * distance(without, k)
