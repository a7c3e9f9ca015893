"""Where in a network an adapter goes: predicates on (path, module), by the layer's type or by its role in a block."""

from torch import nn

from fedlora_mini.adapters.base import NORMS
from fedlora_mini.adapters.ops import CONV, LAYERS, TRANSPOSED

# What a transformer's layers are called here and in MONAI: the last part of the path.
ROLES = {
    "qkv": "qkv",
    "proj": "attention output",
    "out_proj": "attention output",
    "up": "mlp input",
    "linear1": "mlp input",
    "down": "mlp output",
    "linear2": "mlp output",
}
UNUSED = ("norm_cross_attn",)  # MONAI's transformer block has it also where there is no cross attention
BLOCKS = ("Block", "TransformerBlock")  # ViT blocks of MiniSAM and MONAI: (N, T, d) -> (N, T, d)


def role(path: str, module: nn.Module) -> str:
    """The layer's role in a transformer block, "convolution", or "" for anything else."""
    if isinstance(module, (*CONV, *TRANSPOSED)):
        return "convolution"
    return ROLES.get(path.rpartition(".")[2], "") if isinstance(module, nn.Linear) else ""


def layers(path: str, module: nn.Module) -> bool:
    """Every linear layer and convolution."""
    return isinstance(module, LAYERS)


def biased(path: str, module: nn.Module) -> bool:
    """Every layer or norm that has a bias."""
    return (layers(path, module) or norms(path, module)) and module.bias is not None


def norms(path: str, module: nn.Module) -> bool:
    """Every normalisation layer, with or without an affine map of its own, except those that are never called."""
    return isinstance(module, NORMS) and path.rpartition(".")[2] not in UNUSED


def sublayers(path: str, module: nn.Module) -> bool:
    """What ends a sub-layer: the output layers of attention and MLP; every convolution stands for one of its own."""
    return role(path, module) in ("attention output", "mlp output", "convolution")


def mlps(path: str, module: nn.Module) -> bool:
    """The output layer of every MLP, and every convolution."""
    return role(path, module) in ("mlp output", "convolution")


def keys_values(path: str, module: nn.Module) -> bool:
    """Fused query-key-value layers, whose last two thirds (IA)³ scales."""
    return role(path, module) == "qkv"


def activations(path: str, module: nn.Module) -> bool:
    """Layers whose inputs (IA)³ scales: an MLP's inner activations, and what goes into a convolution."""
    return role(path, module) in ("mlp output", "convolution")


def blocks(path: str, module: nn.Module) -> bool:
    """The blocks of a plain vision transformer; an EfficientNet's share the name but not the LayerNorm."""
    return type(module).__name__ in BLOCKS and isinstance(getattr(module, "norm1", None), nn.LayerNorm)
