"""LC-Fed's parts: the gate channel by channel, the disagreement by numpy voxel by voxel, the row in a network."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import Dense, adapters, call, prepare, trainable
from fedlora_mini.adapters.base import NORMS
from fedlora_mini.adapters.calibrated import Calibration, SiteAttention
from fedlora_mini.errors import FedloraError
from fedlora_mini.models import zoo
from fedlora_mini.state import clone, count

NORM = {  # how to make it, a batch, the axes of x̄
    "tokens": (lambda: nn.LayerNorm(6), (4, 3, 6), (1,)),
    "rows": (lambda: nn.LayerNorm(6, elementwise_affine=False), (4, 6), ()),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 5, 4), (2, 3)),
    "instance": (lambda: nn.InstanceNorm2d(6), (4, 6, 5, 4), (2, 3)),
    "batch": (lambda: nn.BatchNorm3d(6), (4, 6, 2, 3, 2), (2, 3, 4)),
    "batch, rows": (lambda: nn.BatchNorm1d(6, affine=False), (4, 6), ()),
}
HEADS = {  # how to make it, a batch
    "pixels": (lambda: nn.Conv2d(5, 3, 1), (4, 5, 4, 3)),
    "voxels": (lambda: nn.Conv3d(5, 2, 1), (4, 5, 2, 3, 2)),
    "tokens": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "rows": (lambda: nn.Linear(5, 3), (4, 5)),
}
every_norm = pytest.mark.parametrize("norm", NORM)
every_head = pytest.mark.parametrize("head", HEADS)


def gated(norm, sites=3, hidden=5):
    make, shape, _ = NORM[norm]
    g = torch.Generator().manual_seed(0)
    base = make()
    for t in base.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=g) + 0.5)
    module = SiteAttention(base.double(), sites, hidden, generator=g).double()
    return module.eval(), torch.randn(shape, generator=g).double() + 0.3


def calibrated(head, sites=3):
    make, shape = HEADS[head]
    g = torch.Generator().manual_seed(0)
    base = make().double()
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=g).double()
    return Calibration(base, sites, generator=g), torch.randn(shape, generator=g).double()


# ---------------------------------------------------------------- channels by site


@every_norm
def test_a_gate_keeps_the_promises(norm, oracle):
    module, x = gated(norm)
    if module.base.state_dict():  # without tensors, a twin of the norm could not know the dtype
        oracle.every_promise(module, x)
    else:
        oracle.rows_are_samples(module, x)
        oracle.groups_are_apart(module, x)


@every_norm
def test_the_gate_row_by_row_and_channel_by_channel(norm, oracle):
    module, x = gated(norm)
    oracle.randomise(module)
    y, axes = module.base(x).detach().numpy(), NORM[norm][2]
    W1, W2, site = (p.detach().numpy() for p in (module.W1, module.W2, module.site))
    for i in range(len(x)):
        mean = x[i : i + 1].numpy().mean(axes)[0] if axes else x[i].numpy()
        h = np.maximum(W1 @ np.concatenate([mean, site]), 0)
        for c in range(6):
            expected = 2 / (1 + np.exp(-W2[c] @ h))
            channel = (slice(None), slice(None), c) if norm == "tokens" else (slice(None), c)
            found = module(x)[i : i + 1][channel].detach().numpy()
            assert np.allclose(found, expected * y[i : i + 1][channel], rtol=1e-10), (i, c)


@every_norm
def test_the_start_is_the_norm_at_every_site_and_then_sites_differ(norm, oracle):
    module, x = gated(norm)
    one_hot = torch.eye(3).double()
    assert all(torch.equal(call(module, {"site": row}, x), module.base(x)) for row in one_hot)
    oracle.randomise(module)
    each = call(module, {"site": one_hot}, torch.cat([x] * 3)).chunk(3)
    for k in range(3):
        assert oracle.close(each[k], call(module, {"site": one_hot[k]}, x))
    assert all(not oracle.close(each[i], each[j], 1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_site_gets_no_gradient_and_the_rest_does(oracle):
    module, x = gated("group")
    oracle.randomise(module)
    module(x).square().sum().backward()
    assert module.still == ("site",) and module.site.grad is None
    assert module.W1.grad.any() and module.W2.grad.any()


def test_an_instance_norm_s_images_are_told_apart_by_what_goes_into_it(oracle):
    """Its outputs all have mean zero: a gate that read them would see the site alone."""
    module, x = gated("instance")
    oracle.randomise(module)
    assert module.base(x).mean((2, 3)).abs().max() < 1e-10
    gates = module.gate(x)
    assert all((gates[0] - gates[i]).abs().max() > 1e-2 for i in (1, 2, 3))


def test_the_dtype_of_a_norm_without_tensors_is_the_network_s():
    model = zoo.build("attention_unet", 2).double()
    assert any(not m.state_dict() for m in model.modules() if isinstance(m, NORMS))
    prepare(model, "lcfed")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    alone = SiteAttention(nn.BatchNorm2d(4).double())
    assert {p.dtype for p in alone.parameters()} == {torch.float64}


def test_what_is_no_norm_or_has_no_channels_is_refused():
    with pytest.raises(FedloraError, match="Linear is no norm; accepted: LayerNorm, Group-"):
        SiteAttention(nn.Linear(4, 6))
    with pytest.raises(FedloraError, match="normalises 2 axes"):
        SiteAttention(nn.LayerNorm((4, 6)))
    for sites, hidden in ((0, 2), (2, 0)):
        with pytest.raises(FedloraError, match=f"sites and hidden must be at least 1, got {sites} and {hidden}"):
            SiteAttention(nn.GroupNorm(2, 4), sites, hidden)
    module, x = gated("group")
    with pytest.raises(FedloraError, match="batch of 4 does not split into 3"):
        call(module, {"site": torch.eye(3).double()}, x)


# ---------------------------------------------------------------- heads that disagree


@every_head
def test_a_calibrated_head_keeps_the_promises(head, oracle):
    oracle.every_promise(*calibrated(head))


@every_head
def test_the_definition_by_numpy_at_every_voxel(head, oracle):
    module, x = calibrated(head)
    oracle.randomise(module)
    W, b, D, d, W_own, D_rest, d_rest = (
        p.detach().numpy()
        for p in (module.base.weight, module.base.bias, *(getattr(module, f) for f in module.factors))
    )
    last = isinstance(module.base, nn.Linear)
    m, n = W.shape[:2]
    features = (x if last else x.movedim(1, -1)).reshape(-1, n).numpy()
    found = (module(x) if last else module(x).movedim(1, -1)).reshape(-1, m).detach().numpy()
    for f, logits in zip(features, found, strict=True):
        z = (W + D).reshape(m, n) @ f + b + d
        votes = []
        for k in range(3):
            e = np.exp((W + D_rest[k]).reshape(m, n) @ f + b + d_rest[k])
            votes.append(e / e.sum())
        u = np.mean([(v - np.mean(votes, 0)) ** 2 for v in votes], 0)
        assert np.allclose(logits, z + W_own @ np.concatenate([z, u]), rtol=1e-9, atol=1e-9)


@every_head
def test_heads_that_agree_leave_a_plain_head_and_a_linear_map_of_its_logits(head, oracle):
    """At the start nobody disagrees; nor do clients that sent the same; only a different one shows."""
    module, x = calibrated(head)
    plain = Dense(module.base)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("D", "d"):
            value = torch.randn(getattr(plain, name).shape, generator=g).double()
            getattr(plain, name).copy_(value)
            getattr(module, name).copy_(value)
        assert oracle.close(module(x), plain(x))
        m = len(module.W_own)
        module.W_own[:, m:] = 7.0  # reads nothing but the disagreement
        assert oracle.close(module(x), plain(x))
        module.D_rest[:], module.d_rest[:] = module.D, module.d
        assert oracle.close(module(x), plain(x))
        module.D_rest[1] = 0.0
        assert not oracle.close(module(x), plain(x), 1e-3)


def test_what_the_others_sent_gets_no_gradient(oracle):
    module, x = calibrated("pixels")
    oracle.randomise(module)
    module(x).square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"D", "d", "W_own"}
    assert set(module.still) == {"D_rest", "d_rest"}


def test_a_head_without_bias(oracle):
    module = Calibration(nn.Conv2d(5, 3, 1, bias=False).double(), 2)
    x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    assert trainable(module).keys() == {"D", "W_own", "D_rest"} and torch.equal(module(x), module.base(x))
    oracle.rows_are_samples(module, x)
    oracle.groups_are_apart(module, x)


def test_a_norm_is_no_head():
    with pytest.raises(FedloraError, match="no low-rank form for LayerNorm"):
        Calibration(nn.LayerNorm(4))


def test_a_federation_of_no_sites_is_refused():
    with pytest.raises(FedloraError, match="sites must be at least 1, got 0"):
        Calibration(nn.Linear(4, 2), 0)


# ---------------------------------------------------------------- the row


def test_the_row_gates_the_decoder_s_norms_and_calibrates_the_head():
    model = prepare(zoo.build("minisam", 2), "lcfed", sites=5)
    where = {path: type(adapter).__name__ for path, adapter in adapters(model)}
    assert {path for path, name in where.items() if name == "SiteAttention"} == {"decoder.norm1", "decoder.norm2"}
    assert where["head"] == "Calibration" and list(where.values()).count("Dense") == 18
    norms = {path for path, module in zoo.build("minisam", 2).named_modules() if isinstance(module, NORMS)}
    assert {path for path, name in where.items() if name == "Affine"} == {p for p in norms if "decoder" not in p}
    assert all(adapter.config().get("sites", 5) == 5 for _, adapter in adapters(model))


def test_a_head_of_any_kernel_is_calibrated():
    """UNet's is a transposed convolution; equal heads are no disagreement, other heads are."""
    model = prepare(zoo.build("unet", 2), "lcfed", sites=3)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = trainable(model)
    path = next(path for path, adapter in adapters(model) if isinstance(adapter, Calibration))
    state[f"{path}.W_own"] = torch.ones_like(state[f"{path}.W_own"])
    state[f"{path}.W_own"][:, :2] = 0  # only the disagreement counts
    plain = call(model, trainable(model), x)
    assert torch.allclose(call(model, state, x), plain, atol=1e-6)
    state[f"{path}.D_rest"][1] = 0.5
    state[f"{path}.d_rest"][1, 0] = 1.0
    assert not torch.allclose(call(model, state, x), plain, atol=1e-3)


def test_dtype_and_device_are_the_layers():
    for module in (
        SiteAttention(nn.GroupNorm(2, 4, dtype=torch.bfloat16, device="meta")),
        SiteAttention(nn.BatchNorm2d(4, affine=False, dtype=torch.bfloat16, device="meta")),
        Calibration(nn.Conv2d(4, 2, 1, dtype=torch.bfloat16, device="meta")),
    ):
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


def test_count():
    assert count(trainable(SiteAttention(nn.GroupNorm(2, 6), 3, 5))) == 5 * (2 * 6 + 3) + 3
    head = Calibration(nn.Conv2d(5, 3, 1), 4)
    trained = {name: v for name, v in clone(trainable(head)).items() if name not in head.still}
    assert count(trained) == (3 * 5 + 3) + 3 * 6 and count(trainable(head)) == count(trained) + 4 * (3 * 5 + 3)
