"""Maps where the truth is known, against other formulas, and the rows that a layer is given."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from fedlora_mini.adapters.ops import matrix_shape, to_matrix
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import nearness as near
from fedlora_mini.experiments.nearness.features import columns
from fedlora_mini.experiments.nearness.maps import root
from fedlora_mini.experiments.rotation import rotations


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def rows(x, y=None):
    """One place an image."""
    return near.Rows(x[:, None], torch.zeros(len(x), 1).byte() if y is None else y[:, None])


# ---------------------------------------------------------------- maps


def test_the_monge_map_takes_one_covariance_to_the_other_at_the_least_cost():
    """T S T = C, T symmetric and positive; and E||Tx - x||² is the Bures distance, by SciPy's matrix roots."""
    S, C = (M @ M.mT for M in (draw(5, 5), draw(5, 5, seed=1)))
    D = near.monge(S, C)
    T = torch.eye(5) + D @ torch.linalg.inv(root(S))
    assert torch.allclose(T @ S @ T, C) and torch.allclose(T, T.mT) and float(torch.linalg.eigvalsh(T).min()) > 0
    a = sqrtm(S.numpy())
    bures = np.trace(S.numpy() + C.numpy() - 2 * sqrtm(a @ C.numpy() @ a).real)
    assert float(D.square().sum()) == pytest.approx(bures)


def test_a_covariance_without_some_directions_needs_no_inverse():
    """Grey images as three channels: one direction, of twice the contrast at the other site."""
    S = torch.ones(3, 3, dtype=torch.float64)
    assert float(near.monge(S, 4 * S).square().sum()) == pytest.approx(3.0)
    assert float(near.monge(S, S).square().sum()) == pytest.approx(0.0, abs=1e-12)


@pytest.fixture(scope="module")
def stretched():
    """Unpaired Gaussian sites: the second is T = I + a positive map of rank 2, moved by a mean."""
    n, N = 8, 40_000
    x, z = draw(N, n) * torch.linspace(2, 0.5, n), draw(N, n, seed=1) * torch.linspace(2, 0.5, n)
    U = torch.linalg.qr(draw(n, 2, seed=2)).Q
    extra = U @ torch.diag(torch.tensor([1.5, 0.8], dtype=torch.float64)) @ U.mT
    return x, z + z @ extra + 3.0, extra


def test_unpaired_gaussian_sites_give_the_maps_strength_and_rank(stretched):
    x, y, extra = stretched
    S = torch.diag(torch.linspace(2, 0.5, 8, dtype=torch.float64).square())
    T = torch.eye(8) + extra
    energy = (S.trace() + (T @ S @ T).trace()) / 2
    found = near.monge_size(rows(x), rows(y), 2)
    assert found["strength"] == pytest.approx(float((extra @ S @ extra).trace() / energy), rel=0.05)
    assert found["rank"] == 2 and found["within"] > 0.99
    assert found["mean"] == pytest.approx(float(8 * 9 / energy), rel=0.05)
    assert near.monge_size(rows(x), rows(y), 1)["within"] < 0.95


def test_the_null_of_halves_is_sampling_noise(stretched):
    x, y, _ = stretched
    found = near.between([rows(x), rows(y)], 2)
    assert found["monge null"]["strength"] < 0.01 * found["monge"]["strength"]
    alike = [near.between([rows(x[i : i + 80]), rows(x[i + 80 : i + 160])], 2) for i in range(0, 1600, 160)]
    noise, null = (np.mean([own[name]["strength"] for own in alike]) for name in ("monge", "monge null"))
    assert noise > 0.02 and null == pytest.approx(2 * noise, rel=0.4)  # halves have half the images: twice the noise


def test_unpaired_maps_are_lower_bounds_and_blind_to_a_turn_of_isotropic_features():
    R = rotations(0.5, (), 6, rng())
    for scale, low, high in ((torch.ones(6), 0.0, 0.01), (torch.linspace(3, 0.3, 6), 0.02, 1.0)):
        x, z = (draw(30_000, 6, seed=s) * scale for s in (0, 1))
        truth = float((x @ R.mT - x).square().sum() / x.square().sum())
        found = near.monge_size(rows(x), rows(z @ R.mT), 6)["strength"]
        assert low * truth <= found <= high * truth
        assert near.paired_map(rows(x), rows(x @ R.mT), 6)["strength"] == pytest.approx(truth, rel=1e-2)


def test_paired_images_tell_how_much_of_a_change_is_linear():
    x = draw(4000, 5)
    straight, bent = x @ draw(5, 5, seed=3), x.square()
    assert near.paired_map(rows(x), rows(straight), 2)["linear"] == pytest.approx(1.0)
    assert near.paired_map(rows(x), rows(bent), 2)["linear"] < 0.05
    same = near.paired_map(rows(x), rows(x + 2.0), 2)
    assert same["strength"] < 1e-20 and same["moved"] < 1e-20  # a moved mean is no map


def test_class_means_find_a_turn_that_covariances_do_not():
    """Three classes whose means turn by 90 degrees in a plane: all of it is a rotation, of two directions."""
    means = 5 * torch.eye(6, dtype=torch.float64)[:3]
    R = torch.eye(6, dtype=torch.float64)
    R[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    y = torch.arange(3).repeat(2000).byte()
    a, b = draw(6000, 6) + means[y.long()], draw(6000, 6, seed=1) + means[y.long()] @ R.mT
    found = near.class_size(rows(a, y), rows(b, y), 2)
    M = means - means.mean(0)
    assert found["strength"] == pytest.approx(float((M @ R.mT - M).square().sum() / M.square().sum()), rel=0.05)
    assert found["turned"] > 0.98 and found["rank"] <= 2 and found["within"] > 0.99
    assert near.class_size(rows(a, y * 0), rows(b, y), 2) == {}  # one class alone has no difference
    two = near.class_size(rows(a[y < 2], y[y < 2]), rows(b[y < 2], y[y < 2]), 4)
    assert two["rank"] == 1  # of two classes


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
    ],
)
def test_the_weight_matrix_times_the_columns_is_what_the_layer_gives(layer):
    x = torch.randn(2, 64, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 8, 8)
    found, (h, w) = columns(layer, x, (16, 16))
    N, G, n, places = found.shape
    assert places == h * w
    W = to_matrix(layer, layer.weight.detach())  # (m, n)
    with torch.no_grad():
        layer.bias.zero_()
        y = layer(x)
    if isinstance(layer, nn.Linear):
        assert torch.allclose((W @ found[:, 0]).mT, y, atol=1e-5) and (h, w) == (8, 8)
    elif isinstance(layer, nn.ConvTranspose2d):  # output (2i, 2j) sees input (i, j) by the kernel's first entry
        assert torch.allclose(
            (W.view(6, 4, 2, 2)[..., 0, 0] @ found[:, 0]).view(N, 6, h, w), y[..., ::2, ::2], atol=1e-5
        )
    else:
        out = W.view(G, -1, n) @ found  # (N, G, m/G, h w)
        assert torch.allclose(out.reshape(N, -1, h, w), y, atol=1e-5) and W.shape == matrix_shape(layer)


class Copying(nn.Module):
    """Its layers are given the mask: as pixels, at half the size, and as tokens."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"pixels": nn.Conv2d(1, 1, 1), "halved": nn.Conv2d(1, 1, 1), "tokens": nn.Linear(1, 1)}
        )
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        self.encoder["pixels"](x)
        self.encoder["halved"](x[..., 1::2, 1::2])  # the middle of each 2 x 2 block is counted to its last pixel
        self.encoder["tokens"](x[..., 2::4, 2::4].flatten(2).mT)
        return self.head(x)


def test_every_row_stands_beside_the_class_of_its_own_place():
    masks = torch.randint(0, 200, (20, 8, 16), generator=rng()).byte()
    split = Split(masks[:, None].float(), masks)
    found = near.inputs(Copying(), split, images=18, places=30)
    assert list(found) == ["encoder.pixels", "encoder.halved", "encoder.tokens"]
    for path, own in found.items():
        assert own.x.shape == (18, 30, 1) and torch.equal(own.x[..., 0], own.y.float()), path
    again = near.inputs(Copying(), Split(split.images + 1, masks), images=18, places=30)  # a twin: the same places
    assert torch.equal(again["encoder.halved"].x, found["encoder.halved"].x + 1)
    other = near.inputs(Copying(), split, images=18, places=30, seed=1)
    assert not torch.equal(other["encoder.halved"].y, found["encoder.halved"].y)


def test_layers_that_cannot_be_taken_apart_are_named():
    with pytest.raises(FedloraError, match="Conv3d"):
        columns(nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 4, 4, 4), (4, 4))
    with pytest.raises(FedloraError, match="no padding but zeros"):
        columns(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 1, 4, 4), (4, 4))
