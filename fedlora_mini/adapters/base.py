"""W = W_0 + ΔW: an adapter wraps a layer, freezes it and trains the few numbers that make ΔW."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora_mini.adapters.ops import LAYERS, matrix_shape
from fedlora_mini.chance import seeded
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State

REGIONS = ("encoder", "decoder", "head")


class Key(NamedTuple):
    """One trained tensor, as sharing and schedules see it."""

    path: str  # of the layer, without the factor: "encoder.blocks.0.attn.qkv"
    factor: str  # its role: "A", "B", "v", "weight", "bias", "running_mean" …
    region: str  # "encoder", "decoder" or "head"
    kind: str  # of the layer: "linear", "conv", "norm" or "other"

    @property
    def name(self) -> str:
        return f"{self.path}.{self.factor}"


class Adapter(nn.Module):
    """y = operation(x; W_0 + ΔW). Subclasses name their `factors`, and define `delta` and `path`.

    `base` is frozen. A factor may carry a leading group axis G (see `ops`): it is then passed in by `functional_call`,
    the module's own parameters never do.
    """

    factors: tuple[str, ...] = ()
    still: tuple[str, ...] = ()  # factors that no optimiser moves: received, or set by the federation
    linear = False  # whether ΔW is linear in the factors: then the mean of the factors gives the mean of the ΔW
    merges = True  # whether it can be folded into the base; a path that is not linear in x cannot
    starts_at_base = True  # whether the layer is the frozen one, to the bit, before the first step

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.check(base)
        self.base: Any = base.requires_grad_(False)
        self._kept: State = {}  # what stood in the base, while merged

    @classmethod
    def check(cls, base: nn.Module) -> None:
        """Raise unless the adapter is defined for this layer: by default, for every layer that has a matrix form."""
        matrix_shape(base)

    def delta(self) -> Tensor:
        """ΔW in `base.weight`'s shape (with the group axis in front, if the factors have one)."""
        raise NotImplementedError

    def path(self, x: Tensor) -> Tensor:
        """x -> ΔW x without forming ΔW: the thin path beside the frozen layer."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments that rebuild it on the same layer."""
        raise NotImplementedError

    def attach(self, model: nn.Module, path: str) -> None:
        """Called once it stands in `model` at `path`: for an adapter that listens to another layer."""

    def adapted(self, x: Tensor) -> Tensor:
        """What the layer gives while it is not merged."""
        return self.base(x) + self.path(x)

    def folded(self) -> State:
        """The base's tensors with the adapter in them, by name."""
        return {"weight": self.base.weight + self.delta().to(self.base.weight.dtype)}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.adapted(x)

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    @torch.no_grad()
    def merge(self) -> None:
        """W_0 <- W_0 + ΔW in place. The old W_0 is kept, so that `unmerge` is exact to the bit."""
        if not self.merges:
            raise FedloraError(f"{type(self).__name__} cannot be merged: it is no change of the layer's weights")
        if not self.merged:
            new = self.folded()
            self._kept = {name: getattr(self.base, name).detach().clone() for name in new}
            for name, value in new.items():
                getattr(self.base, name).copy_(value)

    @torch.no_grad()
    def unmerge(self) -> None:
        for name, value in self._kept.items():
            getattr(self.base, name).copy_(value)
        self._kept = {}

    def frozen(self, name: str = "weight") -> Tensor:
        """The base's own tensor, also while merged."""
        return self._kept.get(name, getattr(self.base, name))

    def unmerged(self) -> State:
        """Its `state_dict`, with the base's own tensors also while merged."""
        return dict(self.state_dict()) | {f"base.{name}": value for name, value in self._kept.items()}


Make = Callable[[nn.Module, torch.Generator], Adapter]
Where = Callable[[str, nn.Module], bool]


def everywhere(path: str, module: nn.Module) -> bool:
    """Every layer that has a matrix form."""
    return isinstance(module, LAYERS)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(path, adapter) in the order of `named_modules`."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def path_generator(seed: int, path: str) -> torch.Generator:
    """A generator for one layer: the same (seed, path) starts with the same factors whatever else is adapted."""
    return seeded(f"{seed}:{path}")


def matching(
    model: nn.Module, where: Where = everywhere, among: tuple[type[nn.Module], ...] = LAYERS
) -> list[tuple[str, nn.Module]]:
    """(path, module) of the types `among` with `where(path, module)`, as far as an adapter may go there.

    Nothing inside another adapter; nothing inside `nn.MultiheadAttention`, which reads its layers' weights and never
    calls them, so that a wrapper would silently do nothing.
    """
    bypassed = tuple(p + "." for p, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    inside = tuple(p + "." for p, _ in adapters(model))
    return [
        (path, module)
        for path, module in model.named_modules()
        if path and not path.startswith(bypassed + inside) and isinstance(module, among) and where(path, module)
    ]


def inject(
    model: nn.Module,
    make: Make,
    where: Where = everywhere,
    seed: int = 0,
    among: tuple[type[nn.Module], ...] = LAYERS,
) -> nn.Module:
    """Replace, in place, every `matching` module by `make(module, generator)`. Raises if nothing matches."""
    found = matching(model, where, among)
    if not found:
        raise FedloraError(f"no layer of {type(model).__name__} matches; it needs one of {[t.__name__ for t in among]}")
    for path, module in found:
        place(model, path, make(module, path_generator(seed, path)))
    return model


def place(model: nn.Module, path: str, adapter: Adapter) -> None:
    """Put `adapter` where its base stands."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, adapter)
    adapter.attach(model, path)


def merge(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its frozen weight, in place; `unmerge` takes it back to the bit.

    Adapters that are no change of weights (`merges` is false: bottlenecks, routers, prompts) go on beside the layer.
    """
    for _, adapter in adapters(model):
        if adapter.merges:
            adapter.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    for _, adapter in adapters(model):
        adapter.unmerge()
    return model


def check_unmerged(model: nn.Module) -> None:
    """Raise if an adapter is merged: the layer then ignores its factors, and whoever sets them changes nothing."""
    for path, adapter in adapters(model):
        if adapter.merged:
            raise FedloraError(f"the adapter at '{path}' is merged: its factors do nothing; call unmerge(model)")


def unload(model: nn.Module) -> nn.Module:
    """Merge and take the wrappers away: a plain model again, at the plain model's speed. In place, for good.

    What cannot be merged stays.
    """
    for path, adapter in [(path, adapter) for path, adapter in adapters(model) if adapter.merges]:
        adapter.merge()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, adapter.base)
    return model


def region(model: nn.Module, path: str) -> str:
    """The region of a path: the first row of `model.regions` whose pattern matches its start, else its first part.

    `model.regions` is a sequence of (regular expression, region). Raises for a region that is none of REGIONS.
    """
    for pattern, name in getattr(model, "regions", ()):
        if name not in REGIONS:
            raise unknown("region", name, REGIONS)
        if re.match(pattern, path):
            return name
    first = path.partition(".")[0]
    if first in REGIONS:
        return first
    accepted = ", ".join(REGIONS)
    raise FedloraError(
        f"'{path}' of {type(model).__name__} has no region: set model.regions = ((pattern, {accepted}), …)"
    )


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def kind(module: nn.Module) -> str:
    """ "linear", "conv", "norm" or "other"."""
    layer = module.base if isinstance(module, Adapter) else module
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, LAYERS):
        return "conv"
    return "norm" if isinstance(layer, NORMS) else "other"


def trainable(model: nn.Module) -> State:
    """What is trained: parameters that require gradients, and the running statistics of norms in training mode.

    And the factors that an adapter keeps `still`: no step moves them, but they belong to the state.
    """
    still = {f"{path}.{factor}".removeprefix(".") for path, adapter in adapters(model) for factor in adapter.still}
    state: State = {name: p for name, p in model.named_parameters() if p.requires_grad or name in still}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            state |= {
                f"{path}.{name}": b for name, b in module.named_buffers() if b is not None and b.is_floating_point()
            }
    return {name: value.detach().clone() for name, value in state.items()}


def keys(model: nn.Module, names: list[str]) -> dict[str, Key]:
    """The `Key` of every name of a state."""
    out = {}
    for name in names:
        path, _, factor = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise FedloraError(f"{type(model).__name__} has no layer '{path}' (from '{name}')") from None
        out[name] = Key(path, factor, region(model, path), kind(module))
    return out


def freeze(model: nn.Module) -> nn.Module:
    """No parameter trains, and norms use their stored statistics."""
    return model.requires_grad_(False).eval()


@torch.no_grad()
def load_state(model: nn.Module, state: State) -> None:
    """Copy a state into the model's own tensors.

    `model.replaced` notes the frozen ones among them, such as weights that a server has folded products into: they are
    no longer the base's, and `save` writes them. Raises for a name or a shape that the model does not have, and where
    an adapter is merged.
    """
    check_unmerged(model)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in state.items():
        if name not in own:
            raise FedloraError(f"{type(model).__name__} has no tensor '{name}'")
        if own[name].shape != value.shape:
            raise FedloraError(f"'{name}' has shape {tuple(own[name].shape)}, not {tuple(value.shape)}")
    for name, value in state.items():
        own[name].copy_(value)
    frozen = {name for name in state if not own[name].requires_grad}
    model.replaced = getattr(model, "replaced", set()) | frozen  # type: ignore[assignment]


def call(model: nn.Module, state: State, x: Tensor) -> Tensor:
    """model(x) with the tensors of `state` in place of its own; group axes allowed. Not for a merged model."""
    return functional_call(model, state, (x,))


class _Delta(nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.delta()


def delta_of(adapter: Adapter, factors: State) -> Tensor:
    """ΔW for other factors than the adapter's own; with a leading axis in the factors, one ΔW each."""
    return functional_call(_Delta(adapter), {f"adapter.{name}": value for name, value in factors.items()}, ())
