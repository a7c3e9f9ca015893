"""A trained adapter in a folder: adapter_config.json + adapter_model.safetensors. Never pickle.

The native format holds every adapter class and whatever else is trained; the peft format holds LoRA for the world
outside (`peft_format`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlora_mini import __version__
from fedlora_mini import state as S
from fedlora_mini.adapters import peft_format
from fedlora_mini.adapters.base import Adapter, adapters, check_unmerged, freeze, load_state, place, trainable
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMATS = ("fedlora", "peft")

Plan = dict[str, dict[str, Any]]  # path -> {"class": "LoRA", "config": {"rank": 4, …}}


def save(model: nn.Module, folder: str | Path, format: str = "fedlora") -> Path:
    """Write what `model` trains into `folder`, and the frozen tensors that `load_state` replaced. Returns the folder.

    Of the rest, the base, `base_digest` is written. `format="peft"` writes what `peft.PeftModel.from_pretrained` reads,
    without a digest: LoRA on Linear and plain Conv2d, `Dense` as a module to save, on the base as it was. A file
    appears under its name only when it is complete.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    state = trained(model)
    if not state:
        raise FedloraError(f"{type(model).__name__} trains nothing: there is nothing to save")
    swapped = replaced(model, state)
    if format == "peft" and swapped:
        told = f"load_state has replaced '{next(iter(swapped))}' of the frozen base, which the peft format cannot hold"
        raise FedloraError(f"{told}: save(model, folder) in the own format can")
    if format == "peft":
        config, state = peft_format.encode(model, state)
    else:
        state |= swapped
        config = {
            "format": "fedlora_mini",
            "version": __version__,
            "recipe": getattr(model, "recipe", None),
            "adapters": plan(model),
            "replaced": sorted(swapped),  # frozen tensors among those of the other file
            "base": base_digest(model, dict(adapters(model)), state),
            "digest": S.digest(state),  # says whether the two files belong together
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in S.clone(state).items()}
    save_file(tensors, folder / f"{TENSORS}.tmp", metadata={"format": "pt"})
    (folder / f"{CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in (TENSORS, CONFIG):
        os.replace(folder / f"{name}.tmp", folder / name)
    return folder


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Read a folder of `save`, or of peft's `save_pretrained`, into `model`, in place.

    A plain model is frozen and gets the adapters; an adapted one must have exactly the same. Names, shapes and, where
    the folder has its digest, the base are checked before a value is copied.
    """
    folder = Path(folder)
    config, state = _read(folder)
    recipe, swapped, base = None, [], None
    if config.get("peft_type"):
        wanted, state = peft_format.decode(model, config, state)
    elif config.get("format") == "fedlora_mini":
        wanted, recipe = config["adapters"], config["recipe"]
        swapped, base = config.get("replaced", []), config.get("base")  # folders of old have neither
        if S.digest(state) != config["digest"]:
            raise FedloraError(f"{TENSORS} in '{folder}' is damaged or belongs to another {CONFIG}")
    else:
        raise FedloraError(f"'{folder / CONFIG}' is neither of fedlora_mini nor of peft")

    here = plan(model)
    if here and here != wanted:
        path = next(p for p in (*here, *wanted) if here.get(p) != wanted.get(p))
        raise FedloraError(f"the model has {here.get(path)} at '{path}', '{folder}' has {wanted.get(path)}")
    check_unmerged(model)
    built = dict(adapters(model)) or {path: _build(model, path, entry) for path, entry in wanted.items()}
    _check(model, built, state)
    if base is not None and base_digest(model, built, state) != base:
        told = f"frozen tensors of this {type(model).__name__} differ from those that it was saved with"
        raise FedloraError(f"'{folder}' belongs to another base: {told}, by their weights, seed or number type")
    if not here:
        _install(model, built, S.pick(state, lambda name: name not in swapped))
    load_state(model, state)
    if recipe is not None:
        model.recipe = recipe
    return model


def plan(model: nn.Module) -> Plan:
    """Which adapter sits where, in JSON's own values."""
    found = {path: {"class": type(a).__name__, "config": a.config()} for path, a in adapters(model)}
    return json.loads(json.dumps(found))


def trained(model: nn.Module) -> State:
    """`trainable`, and what it leaves out for the moment: factors frozen just now, statistics of norms in eval mode."""
    state = trainable(model)
    for path, adapter in adapters(model):
        state |= {f"{path}.{name}": value for name, value in _factors(adapter).items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and any(p.requires_grad for p in module.parameters()):
            state |= {f"{path}.{name}": b for name, b in module.named_buffers() if b.is_floating_point()}
    return S.clone(state)


def replaced(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """The tensors that `load_state` put into the frozen base: what it wrote, less what `state` has by now."""
    noted: set[str] = getattr(model, "replaced", set())
    held = _tensors(model, dict(adapters(model)))
    return S.pick(held, lambda name: name in noted and name not in state)


def base_digest(model: nn.Module, built: Mapping[str, Adapter], state: Mapping[str, Tensor]) -> str:
    """`state.digest` of the base: every floating tensor of the model with the adapters `built` that `state` has not.

    So frozen weights and the statistics that frozen norms use, on whatever device, in the number type that they have;
    no integers, such as a batch norm's counter, which changes no output.
    """
    held = _tensors(model, built)
    return S.digest({name: v for name, v in held.items() if name not in state and v.is_floating_point()})


def _tensors(model: nn.Module, built: Mapping[str, Adapter]) -> State:
    """The model's tensors by name as they are once `built` stand in it, of merged layers the base's own."""
    inside = tuple(f"{path}." for path in built)
    outside = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    return outside | {f"{path}.{name}": value for path, a in built.items() for name, value in a.unmerged().items()}


def _factors(adapter: Adapter) -> State:
    return {name: value for name, value in adapter.state_dict().items() if not name.startswith("base.")}


def _read(folder: Path) -> tuple[dict[str, Any], State]:
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise FedloraError(f"no {' and no '.join(missing)} in '{folder}'")
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    except (ValueError, SafetensorError) as error:
        raise FedloraError(f"the adapter in '{folder}' cannot be read: {error}") from None


def _classes(root: type[Adapter]) -> dict[str, type[Adapter]]:
    """Every subclass that is defined by now: a name in a file can pick one of them and import nothing."""
    return {cls.__name__: cls for sub in root.__subclasses__() for cls in (sub, *_classes(sub).values())}


def _build(model: nn.Module, path: str, entry: Mapping[str, Any]) -> Adapter:
    """The adapter that `entry` describes around the model's layer, not put in place yet."""
    classes = _classes(Adapter)
    if entry.get("class") not in classes:
        raise unknown("adapter class", entry.get("class"), classes)
    try:
        return classes[entry["class"]](model.get_submodule(path), **entry["config"])
    except AttributeError:
        raise FedloraError(f"{type(model).__name__} has no layer '{path}'") from None
    except TypeError as error:
        raise FedloraError(f"the adapter at '{path}' cannot be rebuilt: {error}") from None


def _check(model: nn.Module, built: Mapping[str, Adapter], state: Mapping[str, Tensor]) -> None:
    """Every factor is there, every name is known, every shape fits."""
    own = _tensors(model, built)
    factors = {f"{path}.{name}" for path, a in built.items() for name in _factors(a)}
    wrong = [f"no '{name}' in the file" for name in sorted(factors - state.keys())]
    wrong += [f"'{name}' is not in the model" for name in state if name not in own]
    wrong += [
        f"'{name}' is {tuple(value.shape)} in the file and {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise FedloraError(f"the adapter does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}")


def _install(model: nn.Module, built: Mapping[str, Adapter], state: Mapping[str, Tensor]) -> None:
    """Freeze the model, put the adapters in, let train what else `state` holds: as `prepare` does."""
    freeze(model)
    for path, adapter in built.items():
        place(model, path, adapter)
    own = {name for name in state if name.rpartition(".")[0] not in built}
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.requires_grad_(True)
    if own:
        model.train()
