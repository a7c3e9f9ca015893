"""The model contrast against numpy, and in a training step by hand."""

import math

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.features import embed
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import everything
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.regularizers import Context
from fedlora_mini.regularizers.contrast import Contrast


def features(seed, shape=(3, 5, 4, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def context(z, z_g, z_p, previous=True):
    """Two other models, told apart by a number: the one at the round's start and the client's last."""
    models = {0.0: z_g, 1.0: z_p}
    kept = {"~other": torch.tensor(7.0)} | ({"~previous/w": torch.tensor(1.0)} if previous else {})
    return Context(
        2, 1, {"w": torch.tensor(0.0)}, {}, 0.1, kept=kept, x=torch.zeros(len(z), 1), z=z,
        run=lambda state, x: (x, models[float(state["w"])]),
    )  # fmt: skip


def by_numpy(z, z_g, z_p, mu, tau):
    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    total = 0.0
    for n in range(len(z)):
        own, near, far = (t.numpy()[n].reshape(t.shape[1], -1).mean(1) for t in (z, z_g, z_p))
        up, down = np.exp(cos(own, near) / tau), np.exp(cos(own, far) / tau)
        total += -mu * np.log(up / (up + down))
    return total / len(z)


@pytest.mark.parametrize(("mu", "tau"), [(1.0, 0.5), (5.0, 0.1)])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 4, 3, 2, 2), (1, 3, 6)], ids=str)
def test_the_value_is_that_of_the_formula(mu, tau, shape):
    z, z_g, z_p = (features(seed, shape) for seed in range(3))
    found = Contrast(mu, tau).penalty({}, context(z, z_g, z_p))
    assert float(found) == pytest.approx(by_numpy(z, z_g, z_p, mu, tau), rel=1e-10)


def test_without_a_last_model_it_is_nothing():
    z = features(0)
    assert Contrast().penalty({}, context(z, z, z, previous=False)) == 0.0


def test_where_both_models_agree_it_is_log_two():
    z, other = features(0), features(1)
    assert float(Contrast(mu=3.0).penalty({}, context(z, other, other))) == pytest.approx(3 * math.log(2))


def test_its_gradient_pulls_z_to_the_global_models_and_off_the_last_ones():
    z, z_g, z_p = features(0).requires_grad_(), features(1), features(2)

    def angles(z):
        return [torch.cosine_similarity(z.flatten(2).mean(2), t.flatten(2).mean(2)) for t in (z_g, z_p)]

    [g] = torch.autograd.grad(Contrast().penalty({}, context(z, z_g, z_p)), [z])
    (near, far), (nearer, farther) = angles(z.detach()), angles(z.detach() - 0.5 * g)
    assert ((nearer - farther) > (near - far)).all()
    [only_near] = torch.autograd.grad(Contrast().penalty({}, context(z, z_g, -z_g)), [z])
    assert (angles(z.detach() - 0.5 * only_near)[0] > near).all()


def test_a_training_step_by_hand():
    """z_g from the model that came in, z_p from the last one; both without a gradient."""
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "full").double()
    start = trainable(model)
    rng = torch.Generator().manual_seed(3)
    last = {name: value + 0.1 * torch.randn(value.shape, generator=rng).double() for name, value in start.items()}
    x = torch.rand(2, 3, 16, 16, generator=rng).double()
    y = (x[:, 0] > 0.5).to(torch.uint8)

    method = Method("", "full", everything, objective=(Contrast(2.0, 0.5),))
    kept = [{f"~previous/{name}": value for name, value in last.items()}]
    args = (model, method, keys(model, list(start)), [start], lambda step: (x, y), Budget(2, 2, 0.1, "sgd"), 2)
    [end], _ = train(*args, kept=kept)

    state = start
    for _ in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        logits, z = embed(model, leaves, x)
        own, near, far = (t.mean((2, 3)) for t in (z, embed(model, start, x)[1], embed(model, last, x)[1]))
        scores = [torch.exp(torch.cosine_similarity(own, t.detach()) / 0.5) for t in (near, far)]
        value = segmentation_loss(logits, y).mean() - 2.0 * torch.log(scores[0] / (scores[0] + scores[1])).mean()
        g = torch.autograd.grad(value, list(leaves.values()))
        state = {name: value - 0.1 * own for (name, value), own in zip(state.items(), g, strict=True)}
    assert S.norm(S.sub(end, state)) < 1e-10 * S.norm(state)
    [plain], _ = train(*args)
    assert S.norm(S.sub(end, plain)) > 1e-6 * S.norm(state)
