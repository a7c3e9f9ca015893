"""The shipped base: small, good where it was trained, reproducible to the byte."""

import pytest
import torch
from safetensors.torch import save_file

from fedlora_mini.data import IGNORE, phantom
from fedlora_mini.data.base import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.pretrain import Pretraining, _batch, pretrain
from fedlora_mini.federation.sampling import generator
from fedlora_mini.metrics import evaluate
from fedlora_mini.models import load_base
from fedlora_mini.models.pretrained import BUILT_IN, read_base

SHIPPED = BUILT_IN / "minisam.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def dice(images, masks):
    model = load_base("minisam", len(phantom.CLASSES), same_task=True)
    return evaluate(model, {}, Split(images, masks), phantom.CLASSES, hd95=False).per_class


def test_the_checkpoint_is_small_and_says_how_it_was_made():
    assert SHIPPED.stat().st_size <= 3_000_000
    tensors, notes = read_base(SHIPPED)
    assert 120_000 <= sum(t.numel() for t in tensors.values()) <= 480_000
    assert Pretraining(**notes["pretraining"]) == Pretraining()
    assert tuple(notes["classes"]) == phantom.CLASSES


def test_it_segments_its_own_domain_and_fails_under_inverted_contrast():
    images, masks = phantom.sample(48, 64, generator("test"))
    own, inverted = dice(images, masks), dice(1 - images, masks)
    known = [name for name in own if name != Pretraining().novel]
    assert min(own[name] for name in known) > 0.75
    assert max(inverted[name] for name in known) < 0.5


def test_the_novel_structure_is_ignored_and_not_learnt():
    _, y = _batch(Pretraining(batch=4, size=32), generator(0))
    novel = phantom.CLASSES.index(Pretraining().novel)
    assert (y == IGNORE).any() and not (y == novel).any()
    images, masks = phantom.sample(16, 64, generator("test"))
    assert dice(images, masks)[Pretraining().novel] < 0.1


def test_pretraining_twice_gives_the_same_bytes_and_another_seed_others(tmp_path):
    config = Pretraining(steps=4, batch=2, size=32)
    first, second = (pretrain(config, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second
    assert pretrain(Pretraining(steps=4, batch=2, size=32, seed=1), tmp_path / "c").read_bytes() != first


@pytest.mark.parametrize("model", ["unet", "attention_unet", "segresnet"])
def test_other_networks_can_be_pretrained_too(tmp_path, model):
    out = pretrain(Pretraining(model=model, steps=2, batch=2, size=32), tmp_path / "base.safetensors")
    ours = load_base(model, 2, (32, 32), str(out))
    tensors, _ = read_base(out)
    same = [
        name for name, value in ours.state_dict().items() if torch.equal(value, tensors.get(name, torch.nan * value))
    ]
    assert len(same) > len(tensors) // 2


def test_a_new_task_gets_a_new_head_and_keeps_the_rest():
    model = load_base("minisam", 2, seed=3)
    tensors, _ = read_base(SHIPPED)
    assert model.head.weight.shape[0] == 2
    for name, value in model.state_dict().items():
        assert name.startswith("head") or torch.equal(value, tensors[name])
    assert torch.equal(model.head.weight, load_base("minisam", 2, seed=3).head.weight)
    assert not torch.equal(model.head.weight, load_base("minisam", 2, seed=4).head.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file({"encoder.stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FedloraError, match="does not fit"):
        load_base("minisam", 2, base=str(tmp_path / "other.safetensors"))
    foreign = {"of a run": "server/decoder.mix1.A", "of another network": "model.0.conv.weight"}
    for what, name in foreign.items():
        save_file({name: torch.zeros(1)}, tmp_path / what)
        with pytest.raises(FedloraError, match=f"does not fit model 'minisam', which has no '{name}'; accepted"):
            load_base("minisam", 2, base=str(tmp_path / what))
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(FedloraError, match="cannot read"):
        load_base("minisam", 2, base=str(tmp_path / "text.safetensors"))
    with pytest.raises(FedloraError, match="unknown phantom class"):
        pretrain(Pretraining(novel="spleen"), tmp_path / "x")
