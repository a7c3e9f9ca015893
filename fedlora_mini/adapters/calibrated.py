"""y ⊙ 2σ(W2 relu(W1 [x̄; site])) and z + W_own [z; var_k softmax(z_k)]: LC-Fed's two local calibrations.

The first lets a site choose among a norm's channels, the second corrects the logits z where the clients' heads
disagree about the same features.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_mini.adapters.affine import shape
from fedlora_mini.adapters.base import NORMS, Adapter
from fedlora_mini.adapters.bias import spread
from fedlora_mini.adapters.dense import Dense
from fedlora_mini.adapters.lora import kaiming_uniform
from fedlora_mini.adapters.mixture import pooled
from fedlora_mini.adapters.ops import add_bias, group_size, linear, matrix_shape, operate, pointwise
from fedlora_mini.errors import FedloraError


class SiteAttention(Adapter):
    """y = norm(x) ⊙ 2σ(W2 relu(W1 [x̄; site])); W1: (h, c + K), W2: (c, h), site: (K,), x̄ the mean of x by channel.

    `site` is the client's one-hot vector, zero until a federation of K `sites` has written it; no optimiser moves it.
    W2 = 0 at the start, where the gate is 1. It stands behind a norm because a norm would take out a gate in front of
    it, and it reads the norm's input because the mean of an instance norm's output is the same for all images.
    h (2 c + K) trained numbers a norm. Wang et al. 2022 (LC-Fed) gate the encoder's output once and learn the site's
    embedding by a contrast; one gate a norm and the one-hot vector are ours.
    """

    factors = ("W1", "W2", "site")
    still = ("site",)
    merges = False

    def __init__(
        self, base: nn.Module, sites: int = 4, hidden: int = 8, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        if min(sites, hidden) < 1:
            raise FedloraError(f"sites and hidden must be at least 1, got {sites} and {hidden}")
        (c,), self.sites, self.hidden = shape(base), sites, hidden
        self.W1 = nn.Parameter(kaiming_uniform((hidden, c + sites), generator or torch.default_generator))
        self.W2 = nn.Parameter(torch.zeros(c, hidden))
        self.site = nn.Parameter(torch.zeros(sites), requires_grad=False)
        self.join(base.state_dict().values())

    @classmethod
    def check(cls, base: nn.Module) -> None:
        if not isinstance(base, NORMS):
            raise FedloraError(f"{type(base).__name__} is no norm; accepted: LayerNorm, Group-, Instance-, BatchNorm")
        if len(shape(base)) != 1:
            raise FedloraError(f"a {base} normalises {len(shape(base))} axes: none of them holds the channels")

    def attach(self, model: nn.Module, path: str) -> None:
        """A norm without tensors has the dtype and device of the network around it."""
        mine = {id(p) for p in self.parameters()}
        if not self.base.state_dict():
            self.join(p for p in model.parameters() if id(p) not in mine)

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Take the dtype and device of the first of them that holds floating-point numbers."""
        like = next((t for t in tensors if t.is_floating_point()), None)
        if like is not None:
            self.to(like)

    def gate(self, x: Tensor) -> Tensor:
        """A number for every row of the batch and channel, in (0, 2): (N, c)."""
        site = self.site.reshape(-1, self.sites)  # (G, K)
        site = site.repeat_interleave(group_size(x, len(site)), 0)  # (N, K)
        h = F.relu(linear(torch.cat([pooled(self.base, x), site], -1), self.W1))
        return 2 * linear(h, self.W2).sigmoid()

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows, gate = spread(self.base, y, self.gate(x))
        return (rows * gate).reshape(y.shape)

    def config(self) -> dict[str, Any]:
        return {"sites": self.sites, "hidden": self.hidden}


class Calibration(Dense):
    """logits = z + W_own [z; u], z = W x + b the client's own, u = var_k softmax(z_k) by class, z_k by client k's head.

    W = W_0 + D, b = b_0 + d as in `Dense`; W_own: (C, 2C), zero at the start, a 1x1 convolution of the client alone.
    D_rest: (K, *weight.shape) and d_rest: (K, C) hold the D and d that the K clients (`sites`) last sent: received,
    never trained. Zero is the base's head, so all agree and u = 0 until heads have come. u's gradient reaches the body.
    m n + m + 2 m² trained numbers. Wang et al. 2022 (LC-Fed) let the disagreement attend to features; this form is
    ours. For any head that is one layer, convolutions of any kernel included.
    """

    factors = (*Dense.factors, "W_own", "D_rest", "d_rest")
    still = ("D_rest", "d_rest")
    linear = False
    merges = False

    def __init__(self, base: nn.Module, sites: int = 4, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if sites < 1:
            raise FedloraError(f"sites must be at least 1, got {sites}")
        W, b, C = self.base.weight, self.base.bias, matrix_shape(base)[0]
        self.sites = sites
        self.W_own = nn.Parameter(W.new_zeros(C, 2 * C))
        self.D_rest = nn.Parameter(W.new_zeros(sites, *W.shape), requires_grad=False)
        self.d_rest = None if b is None else nn.Parameter(b.new_zeros(sites, C), requires_grad=False)

    def heads(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """z_k = y + D_k x + d_k of every client; y = W_0 x + b_0."""
        for k in range(self.sites):
            z = y + operate(self.base, x, self.D_rest.select(-1 - self.base.weight.dim(), k))
            yield z if self.d_rest is None else add_bias(self.base, z, self.d_rest[..., k, :])

    def adapted(self, x: Tensor) -> Tensor:
        y, axis = self.base(x), -1 if isinstance(self.base, nn.Linear) else 1
        z = y + self.path(x)
        u = torch.stack([other.softmax(axis) for other in self.heads(x, y)]).var(0, correction=0)
        return z + self.across(torch.cat([z, u], axis))

    def across(self, both: Tensor) -> Tensor:
        """W_own [z; u], the same at every token or voxel."""
        if isinstance(self.base, nn.Linear):
            return linear(both, self.W_own)
        return pointwise(both, self.W_own.reshape(-1, 1, *self.W_own.shape[-2:]))

    def config(self) -> dict[str, Any]:
        return {"sites": self.sites}
