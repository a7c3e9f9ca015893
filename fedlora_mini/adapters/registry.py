"""The table of what can be trained: one row a recipe. A contract test runs on every row."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedlora_mini.adapters import places, ranks
from fedlora_mini.adapters.affine import Affine
from fedlora_mini.adapters.base import Adapter, Where, adapters, freeze, inject, matching, region
from fedlora_mini.adapters.bias import Bias
from fedlora_mini.adapters.blend import Blend
from fedlora_mini.adapters.bottleneck import AdaptFormer, Houlsby
from fedlora_mini.adapters.calibrated import Calibration, SiteAttention
from fedlora_mini.adapters.dense import Dense
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.dora import DoRA, EDoRA
from fedlora_mini.adapters.dual import Dual, Fused
from fedlora_mini.adapters.gate import IA3
from fedlora_mini.adapters.hydra import Experts, Hydra, WithRest
from fedlora_mini.adapters.kronecker import ALoRE
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.adapters.mixture import MixtureSARA
from fedlora_mini.adapters.prilora import PRILoRA
from fedlora_mini.adapters.prompt import Prompt
from fedlora_mini.errors import FedloraError, unknown

BODY = ("encoder", "decoder")


@dataclass(frozen=True)
class Placement:
    """One kind of adapter and where it goes. `fixed` options are the row's own, `rank` chooses a rank by layer."""

    wrap: type[Adapter]
    where: Where = places.layers
    regions: tuple[str, ...] = BODY
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: ranks.RankRule | None = None

    @property
    def options(self) -> frozenset[str]:
        """What a caller may set."""
        own = set(inspect.signature(self.wrap).parameters) - {"base", "generator"} - set(self.fixed)
        if self.rank is not None:
            own = own - {"rank"} | _keywords(self.rank)
        return frozenset(own)

    def put(self, model: nn.Module, seed: int, options: Mapping[str, Any]) -> bool:
        """Wrap every fitting layer; False if there is none."""

        def here(path: str, module: nn.Module) -> bool:
            return self.where(path, module) and region(model, path) in self.regions

        found = matching(model, here, (nn.Module,))
        mine = {name: value for name, value in options.items() if name in self.options} | dict(self.fixed)
        rule = {name: mine.pop(name) for name in list(mine) if self.rank is not None and name in _keywords(self.rank)}
        chosen = {}
        for i, (_, layer) in enumerate(found):
            rank = {} if self.rank is None else {"rank": self.rank(layer, i / max(1, len(found) - 1), **rule)}
            chosen[id(layer)] = mine | rank

        def make(layer: nn.Module, generator: torch.Generator) -> Adapter:
            return self.wrap(layer, generator=generator, **chosen[id(layer)])  # type: ignore[call-arg]

        if found:
            inject(model, make, here, seed, (nn.Module,))
        return bool(found)


def _keywords(rule: Callable[..., int]) -> set[str]:
    return {p.name for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Recipe:
    """What is trained in a model: adapters in their places and at the head, or the model's own parameters."""

    summary: str
    reference: str = ""
    place: tuple[Placement, ...] = ()
    own: Callable[[str], bool] | None = None  # region -> whether the model's own parameters train there
    lr: float = 5e-3  # Adam's rate to start a search from
    head: Placement = Placement(Dense, regions=("head",))  # what goes around every layer of the head
    federated: bool = False  # whether it was made for a federation: `federation.methods` says which parts travel

    @property
    def grouped(self) -> bool:
        """Whether everything it trains can carry a group axis: adapters can, a model's own parameters cannot."""
        return self.own is None

    @property
    def options(self) -> frozenset[str]:
        """What `prepare` takes for it."""
        return frozenset().union(*(p.options for p in (*self.place, self.head)))


def _at(
    wrap: type[Adapter], where: Where = places.layers, rank: ranks.RankRule | None = None, **fixed: Any
) -> Placement:
    return Placement(wrap, where, fixed=fixed, rank=rank)


_NORMS = _at(Affine, places.norms)
_DECODER = (Placement(Dense, regions=("decoder",)), Placement(Affine, places.norms, ("decoder",)))

ADAPTERS: dict[str, Recipe] = {
    # low rank, the same in every layer
    "lora": Recipe("ΔW = s B A", "hu2022lora", (_at(LoRA),)),
    "rslora": Recipe("ΔW = s B A, s = alpha / sqrt(r)", "kalajdzievski2023rslora", (_at(LoRA, rslora=True),)),
    "riemannian": Recipe("LoRA; gradients preconditioned by the other factor", "zhang2024riemannian", (_at(LoRA),)),
    "flat_lora": Recipe("LoRA; trained under noise on the full weight", "li2025flatlora", (_at(LoRA),)),
    "pego": Recipe("parallel LoRAs, orthogonal to W_0 and to each other", "hu2024pego", (_at(LoRA),)),
    "dora": Recipe("W = g ⊙ (W_0 + s B A) / row norms", "liu2024dora", (_at(DoRA),)),
    "edora": Recipe("DoRA with B, A from the SVD of W_0, only R and g trained", "nasiri2025edora", (_at(EDoRA),)),
    "alore": Recipe("ΔW = Σ S_i ⊗ (D_i U_i)", "du2024alore", (_at(ALoRE),)),
    # low rank, chosen
    "arena": Recipe("ΔW = s B diag(v) A, l1 on v by a proximal step", "baklouti2025arena", (_at(Diagonal),)),
    "sora": Recipe("the same, v a gate with a threshold", "ding2023sora", (_at(Diagonal, start="gate"),)),
    "adalora": Recipe("the same, v under a global budget", "zhang2023adalora", (_at(Diagonal, start="small"),)),
    "sublora": Recipe(
        "the same, directions selected after training", "gao2025sublora", (_at(Diagonal, start="small"),)
    ),
    "aroma": Recipe("LoRA grown by rank-one pieces", "sheng2025aroma", (_at(LoRA),)),
    "sr_lora": Recipe("LoRA, r = stable rank of W_0", "zhang2025srlora", (_at(LoRA, rank=ranks.by_stable_rank),)),
    "sara": Recipe(
        "B diag(v) A, r from W_0's spectrum", "gu2024sara", (_at(Diagonal, rank=ranks.by_spectrum, start="unit"),)
    ),
    "mo_sara": Recipe("a router over singular-value vectors", "gu2024sara", (_at(MixtureSARA),)),
    "prilora": Recipe("LoRA, r grows with depth, A masked", "benedek2024prilora", (_at(PRILoRA, rank=ranks.by_depth),)),
    # beside and after the layers
    "houlsby": Recipe(
        "a bottleneck after every sub-layer, and the norms",
        "houlsby2019adapter",
        (_at(Houlsby, places.sublayers), _NORMS),
    ),
    "adaptformer": Recipe("a bottleneck beside every MLP", "chen2022adaptformer", (_at(AdaptFormer, places.mlps),)),
    "ia3": Recipe(
        "scales on keys, values and inner activations",
        "liu2022ia3",
        (_at(IA3, places.keys_values, side="kv"), _at(IA3, places.activations, side="in")),
    ),
    "prompt": Recipe(
        "tokens beside the image's in every ViT block", "jia2022vpt", (_at(Prompt, places.blocks),), lr=1e-2
    ),
    # small parts of the network itself
    "bitfit": Recipe("every bias", "zaken2022bitfit", (_at(Bias, places.biased),)),
    "affine": Recipe("scale and shift of every norm", "", (_NORMS,)),
    "head": Recipe("the head alone (linear probe)"),
    "decoder": Recipe("every weight of decoder and head", "", _DECODER, lr=2e-3),
    "full": Recipe("every parameter, norm statistics included", own=lambda region: True, lr=1e-3),
    # for federations: parts that are shared, a client's own, or received
    "dual": Recipe("ΔW = s (B A + B_own A_own)", "", (_at(Dual),), federated=True),
    "dual_alike": Recipe("the same, with A_own = A at first", "", (_at(Dual, alike=True),), federated=True),
    "fdlora": Recipe("the same, each branch times a number", "qi2024fdlora", (_at(Fused),), federated=True),
    "hydra": Recipe("a router over several B with one A", "tian2024hydralora", (_at(Hydra),), federated=True),
    "fedalt": Recipe("a router over B A and the others' mean", "bian2026fedalt", (_at(WithRest),), federated=True),
    "pfedsam": Recipe("LoRA and a client's own mixture", "wang2025pfedsam", (_at(Experts),), federated=True),
    "pfedlora": Recipe(
        "(1 - μ) D_own + μ s B A, D_own every weight", "yi2023pfedlora", (_at(Blend),), lr=2e-3, federated=True
    ),
    "lcfed": Recipe(
        "every weight, gates by site at the decoder's norms, a calibrated head",
        "wang2022lcfed",
        (
            _at(Dense),
            Placement(Affine, places.norms, ("encoder",)),
            Placement(SiteAttention, places.norms, ("decoder",)),
        ),
        head=Placement(Calibration, regions=("head",)),
        lr=1e-3,
        federated=True,
    ),
    "fedmsa": Recipe(
        "bottlenecks in the encoder, every weight of the decoder",
        "liu2024fedfms",
        (Placement(AdaptFormer, places.mlps, ("encoder",)), *_DECODER),
        lr=2e-3,
        federated=True,
    ),
}


def prepare(model: nn.Module, name: str = "lora", seed: int = 0, **options: Any) -> nn.Module:
    """Make `model` trainable as row `name` says, in place; everything else is frozen. Options go to the adapters.

    After it, `trainable(model)` is the state that a federation moves. Raises for an unknown row or option, for a model
    that has adapters already, and where the network has no place for any of the row's adapters.
    """
    if name not in ADAPTERS:
        raise unknown("adapter", name, ADAPTERS)
    recipe = ADAPTERS[name]
    for option in options:
        if option not in recipe.options:
            raise unknown(f"option of adapter '{name}'", option, recipe.options)
    if (there := next(adapters(model), None)) is not None:
        raise FedloraError(f"{type(model).__name__} has an adapter at '{there[0]}' already: prepare a plain model")
    freeze(model)
    model.recipe = name  # type: ignore[assignment]  # what `save` writes down
    if recipe.own is not None:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(recipe.own(region(model, path)))
        return model.train()
    _check_head(model, name)
    put = [each.put(model, seed, options) for each in recipe.place]
    if put and not any(put):
        raise FedloraError(f"{type(model).__name__} has no place for adapter '{name}' ({recipe.summary})")
    recipe.head.put(model, seed, options)
    return model


def _check_head(model: nn.Module, name: str) -> None:
    """Raise unless the model has a head, and the row an adapter for every layer of it."""
    head = matching(model, lambda path, module: region(model, path) == "head")
    if not head:
        raise FedloraError(f"{type(model).__name__} has no layer in the region 'head'")
    for path, layer in head:
        try:
            ADAPTERS[name].head.wrap.check(layer)
        except FedloraError as error:
            row = f"adapter '{name}' ({ADAPTERS[name].summary})"
            raise FedloraError(f"{type(model).__name__} has no place for {row} at '{path}': {error}") from None
