"""Our LoRA as peft writes it, and back. Pure renaming: peft itself is not needed.

| here | in peft |
|---|---|
| `<path>.A` (r, n) | `base_model.model.<path>.lora_A.weight` (r, n), for Conv2d (r, c_in, kh, kw) |
| `<path>.B` (m, r) | `base_model.model.<path>.lora_B.weight` (m, r), for Conv2d (m, r, 1, 1) |
| `Dense` on a head: W_0 + D, b_0 + d | a module to save: `base_model.model.<path>.weight`, `.bias` |
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters
from fedlora_mini.adapters.dense import Dense
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.ops import LAYERS
from fedlora_mini.errors import FedloraError
from fedlora_mini.state import State

PREFIX = "base_model.model."
# Settings of peft that change what the factors mean. `init_lora_weights` counts where it rewrites the base (PiSSA …).
UNSUPPORTED = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("velora_config", "megatron_config"),
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# What the error says where a network has layers that the format cannot hold.
INSTEAD = (
    "on a plain model, adapt such layers alone: "
    "inject(freeze(model), lambda layer, rng: LoRA(layer, 4, generator=rng), among=(nn.Linear,))"
)


def encode(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """(adapter_config, tensors) of an adapted model whose trained state is `state`."""
    found = dict(adapters(model))
    lora = {path: a for path, a in found.items() if type(a) is LoRA}
    dense = {path: a for path, a in found.items() if type(a) is Dense}
    rest = [f"{path} ({type(a).__name__})" for path, a in found.items() if path not in lora and path not in dense]
    rest += [name for name in state if name.rpartition(".")[0] not in found]
    if rest or not lora:
        raise FedloraError(f"the peft format holds LoRA and Dense only, not {', '.join(rest[:3]) or 'a model without'}")
    tensors: State = {}
    for path, a in lora.items():
        if told := _misfit(path, a.base):
            raise FedloraError(f"{told}; {INSTEAD}")
        kernel = tuple(a.base.weight.shape[1:])  # (n,) or (c_in, kh, kw)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = state[f"{path}.A"].reshape(a.rank, *kernel)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = state[f"{path}.B"].reshape(-1, a.rank, *(1,) * (len(kernel) - 1))
    names = [name for name, _ in model.named_modules() if ".base" not in name]
    for path, d in dense.items():
        if also := [name for name in names if name.endswith(path) and name != path]:  # how peft matches them
            raise FedloraError(f"peft cannot save the module '{path}' alone: '{also[0]}' ends with the same name")
        tensors[f"{PREFIX}{path}.weight"] = d.frozen() + state[f"{path}.D"]
        if d.d is not None:
            tensors[f"{PREFIX}{path}.bias"] = d.frozen("bias") + state[f"{path}.d"]
    rslora = {a.rslora for a in lora.values()}
    if len(rslora) > 1:
        raise FedloraError("the peft format has one use_rslora for all layers; here some use it and some do not")
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in _ranks(lora))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora.pop(),
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": "|".join(re.escape(path) for path in lora),  # a full match: a list would match suffixes too
        "rank_pattern": {f"^{re.escape(path)}": a.rank for path, a in lora.items() if a.rank != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a.alpha for path, a in lora.items() if a.alpha != alpha},
        "modules_to_save": list(dense) or None,
    }, tensors


def _ranks(lora: Mapping[str, LoRA]) -> tuple[list[int], list[float]]:
    return [a.rank for a in lora.values()], [a.alpha for a in lora.values()]


def decode(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Any]], State]:
    """(plan, state) as `io` wants them, for the plain `model` that peft adapted."""
    if config.get("peft_type") != "LORA":
        raise FedloraError(f"only LORA can be read from peft, this is {config.get('peft_type')}")
    asked = [name for name in UNSUPPORTED if config.get(name)]
    asked += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights", True)
    asked += [f"init_lora_weights={start}"] if start not in PLAIN_STARTS else []
    if asked:
        raise FedloraError(f"this peft adapter uses {', '.join(asked)}: plain LoRA can be read")
    plan: dict[str, dict[str, Any]] = {}
    state: State = {}
    for key, value in tensors.items():
        path, _, factor = key.removeprefix(PREFIX).rpartition(".")
        path, _, branch = path.rpartition(".lora_") if path.endswith((".lora_A", ".lora_B")) else (path, "", "")
        layer = _layer(model, path)
        if branch:
            if told := _misfit(path, layer):
                raise FedloraError(told)
            state[f"{path}.{branch}"] = value.flatten(1)  # (r, n) or (m, r)
            if branch == "A":
                alpha = float(_for_path(config.get("alpha_pattern") or {}, path, config["lora_alpha"]))
                settings = {"rank": value.shape[0], "alpha": alpha, "rslora": bool(config.get("use_rslora"))}
                plan[path] = {"class": "LoRA", "config": settings}
        elif isinstance(layer, LAYERS) and factor in ("weight", "bias"):
            own = _own(layer, factor)
            if own is None or own.shape != value.shape:
                raise FedloraError(f"'{key}' does not fit the layer '{path}'")
            state[f"{path}.{'D' if factor == 'weight' else 'd'}"] = value.to(own) - own
            plan[path] = {"class": "Dense", "config": {}}
        else:
            raise FedloraError(f"'{key}' is neither a LoRA factor of a Linear or Conv2d nor a saved layer")
    return plan, state


def _layer(model: nn.Module, path: str) -> Any:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise FedloraError(f"{type(model).__name__} has no layer '{path}'") from None
    return layer.base if path in dict(adapters(model)) else layer


def _own(layer: Any, factor: str) -> Tensor | None:
    value = getattr(layer, factor)
    return None if value is None else value.detach()


def _misfit(path: str, layer: Any) -> str:
    """Why the layer has no place in the format: peft rebuilds the thin convolution from stride and padding alone."""
    if isinstance(layer, nn.Linear):
        return ""
    if not isinstance(layer, nn.Conv2d):
        return f"'{path}' is a {type(layer).__name__}; the peft format here holds Linear and plain Conv2d"
    if layer.groups != 1 or tuple(layer.dilation) != (1, 1) or layer.padding_mode != "zeros":
        return f"'{path}' has groups, dilation or a padding mode that peft's LoRA does not keep"
    return ""


def _for_path(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of the path."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)
