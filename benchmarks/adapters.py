"""What does each adapter cost beside LoRA: a training step with its companions, and the merged network's inference?"""

from collections.abc import Callable
from typing import Any

import torch
from timing import Row, compare, main
from torch import Tensor, nn

from fedlora_mini.adapters import ADAPTERS, keys, merge, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.sharing import everything
from fedlora_mini.models import zoo
from fedlora_mini.regularizers.companions import companions

NETWORKS = {"minisam": 48, "unet": 64}
STEPS = 10  # in one act: a check of AROMA's and a mask of AdaLoRA's are among them

# What a training step forms that is m x n; tests/adapters/test_no_dense.py measures it.
DENSE = {
    "flat_lora": "the noise on W_0: its definition",
    "decoder": "ΔW of the decoder: it is what trains",
    "fedmsa": "ΔW of the decoder: it is what trains",
    "pfedlora": "D_own of every layer: it is what trains",
    "lcfed": "ΔW of every layer: it is what trains",
    "full": "the gradient of W: it is what trains",
}
COPIES = {  # W_0 itself, of transposed convolutions, put into the order of a matrix
    "dora": "no (W_0 of transposed convolutions is copied)",
    "edora": "no (W_0 of transposed convolutions is copied)",
    "aroma": "no (W_0 of transposed convolutions is copied)",
    "pego": "no (W_0 of transposed convolutions is copied)",
}


def prepared(network: str, row: str) -> nn.Module | None:
    """The network with the row's adapters, of rank 4 where the row lets one choose; None where it has no place."""
    options = {"rank": 4} if "rank" in ADAPTERS[row].options else {}
    try:
        return prepare(zoo.build(network, classes=2), row, **options)
    except FedloraError as error:
        if "no place" not in str(error):
            raise
        return None


def steps(model: nn.Module, row: str, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A client's local training: forward, backward, the companions' hooks, Adam."""
    start = trainable(model)
    table, method = keys(model, list(start)), Method("", row, everything, objective=companions(row))
    return lambda: train(model, method, table, [start], lambda step: (x, y), Budget(steps=STEPS), round=1)


def beside(setting: str, arms: dict[str, Callable[[], Any]], rounds: int) -> list[Row]:
    """LoRA and five arms at a time, so that what is divided was measured within seconds."""
    others, rows = [row for row in arms if row != "lora"], []
    for i in range(0, len(others), 5):
        some = compare(setting, "lora", {row: arms[row] for row in ("lora", *others[i : i + 5])}, rounds)
        rows += some[1:] if rows else some
    return rows


def measure() -> list[Row]:
    """What does each adapter cost beside LoRA: a training step with its companions, and the merged inference?"""
    rows = []
    for network, side in NETWORKS.items():
        x = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0))
        y = (x.mean(1) > 0.5).to(torch.uint8)
        models = {row: model for row in ADAPTERS if (model := prepared(network, row)) is not None}
        arms = {row: steps(model, row, x, y) for row, model in models.items()}
        training = beside(f"{network}, {side} px, batch 8: step", arms, rounds=9)
        for line in training:
            line["ms"] = round(line["ms"] / STEPS, 3)
        merged = {row: merge(model).eval().requires_grad_(False) for row, model in models.items()}
        arms = {row: (lambda model=model, x=x: model(x)) for row, model in merged.items()}
        rows += training + beside(f"{network}: merged inference", arms, rounds=11)
    return [line | {"note": DENSE.get(line["arm"]) or COPIES.get(line["arm"], "no")} for line in rows]


if __name__ == "__main__":
    main(measure)
