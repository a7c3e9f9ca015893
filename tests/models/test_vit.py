"""The classifier: its parts, its base, gradients per image on it."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.adapters.grouped import per_sample_gradients
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.pretrain_digits import DigitPretraining, pretrain_digits
from fedlora_mini.losses import task_loss
from fedlora_mini.models import CLASSIFIERS, MODELS, build
from fedlora_mini.models.pretrained import BUILT_IN, read_base


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def setting(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = prepare(build("vit", 10).double(), "lora", rank=2)
    state = {name: v + 0.1 * torch.randn(v.shape, generator=g).double() for name, v in trainable(model).items()}
    return model, state, torch.rand(n, 3, 12, 12, generator=g).double(), torch.randint(0, 10, (n,), generator=g)


def test_it_gives_an_image_one_label_from_patches_of_any_grid():
    model = build("vit", 7)
    assert model(torch.rand(2, 3, 12, 12)).shape == model(torch.rand(2, 3, 16, 8)).shape == (2, 7)
    with pytest.raises(FedloraError, match="multiples of 4"):
        model(torch.rand(2, 3, 10, 12))


def test_encoder_and_head_are_its_regions_and_the_head_trains_whole():
    model, state, _, _ = setting()
    table = keys(model, list(state)).values()
    assert {key.region for key in table} == {"encoder", "head"}
    assert {key.factor for key in table if key.region == "head"} == {"D", "d"}
    assert sum(v.numel() for v in state.values()) < 2000, "few numbers, little noise"


def test_gradients_per_image_equal_the_one_by_one_loop():
    model, state, x, y = setting()
    found, losses = per_sample_gradients(model, state, task_loss, x, y)
    for i in range(len(x)):
        leaves = {n: v.clone().requires_grad_() for n, v in state.items()}
        value = task_loss(call(model, leaves, x[i : i + 1]), y[i : i + 1]).sum()
        alone = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        assert S.norm(S.sub({n: g[i] for n, g in found.items()}, alone)) < 1e-10 * S.norm(alone)
        assert float(losses[i]) == pytest.approx(float(value.detach()))


def test_images_of_several_clients_see_each_their_own_clients_factors():
    model, one, x, y = setting(5)
    _, two, _, _ = setting(5, seed=1)
    owner = torch.tensor([0, 0, 1, 1, 1])
    both, _ = per_sample_gradients(model, S.stack([one, two]), task_loss, x, y, owner=owner)
    for rows, state in ((slice(0, 2), one), (slice(2, 5), two)):
        alone, _ = per_sample_gradients(model, state, task_loss, x[rows], y[rows])
        assert all(torch.allclose(both[n][rows], g, rtol=1e-10, atol=1e-14) for n, g in alone.items())
    none, _ = per_sample_gradients(model, S.stack([one, two]), task_loss, x[:0], y[:0], owner=owner[:0])
    assert {n: g.shape for n, g in none.items()} == {n: (0, *v.shape) for n, v in one.items()}


def test_a_network_of_the_other_task_is_refused():
    assert not set(MODELS) & set(CLASSIFIERS)
    with pytest.raises(FedloraError, match="'minisam' is not made for classification; accepted: vit"):
        Federation.build(RunConfig(data="digits", size=16))
    with pytest.raises(FedloraError, match="'vit' is not made for segmentation"):
        Federation.build(RunConfig(size=16, model="vit", data_options={"per_site": 2, "val": 1, "test": 1}))


def test_the_base_is_small_and_says_how_it_was_made():
    path = BUILT_IN / "vit.safetensors"
    assert path.stat().st_size < 100_000
    assert DigitPretraining(**read_base(path)[1]["pretraining"]) == DigitPretraining()


def test_pre_training_is_reproducible(tmp_path):
    config = DigitPretraining(steps=6, batch=16)
    first = pretrain_digits(config, tmp_path / "a").read_bytes()
    assert pretrain_digits(config, tmp_path / "b").read_bytes() == first
