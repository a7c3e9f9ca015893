"""Answers of a model with the tensors of a state; the scores themselves are in tests/test_metrics.py."""

import pytest
import torch

from fedlora_mini.adapters import call, load_state, merge, prepare, trainable, unmerge
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.metrics.classification import recognise
from fedlora_mini.metrics.segmentation import predict
from fedlora_mini.models.minisam import MiniSAM

X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_state_is_refused_where_merged_adapters_would_ignore_it():
    model = prepare(MiniSAM(depth=1, d=16, width=8), "lora", rank=2)
    state = {name: torch.randn_like(value) for name, value in trainable(model).items()}
    expected = call(model, state, X).argmax(1)
    assert torch.equal(predict(model, state, X, batch=2), expected)
    load_state(model, state)
    merge(model)
    with pytest.raises(FedloraError, match=r"is merged: its factors do nothing; call unmerge\(model\)"):
        predict(model, state, X)
    with pytest.raises(FedloraError, match="is merged"):
        recognise(model, state, Split(X, torch.zeros(3, dtype=torch.int64)), ("background", "organ"))
    assert torch.equal(predict(model, {}, X), model(X).argmax(1))  # the merged model itself
    assert torch.equal(predict(unmerge(model), state, X), expected)
