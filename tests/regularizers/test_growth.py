"""AROMA's growth: which piece trains, that finished ones keep their bits, and when pieces and layers end."""

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import keys, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.growth import Growth


def ranks(state):
    return {name: int(B.any(0).sum()) for name, B in state.items() if name.endswith(".B")}


def drive(term, layer, A, B, moves):
    """The hooks on one layer with given moves (dA, dB) in place of an optimiser; yields what it looks like after each."""
    state, memory = {"P.A": A.clone(), "P.B": B.clone()}, {}
    for step, (dA, dB) in enumerate(moves, 1):
        context = Context(1, step, {}, {}, 0.1, len(moves), layers={"P": layer}, memory=memory)
        gradient = {"P.A": dA.clone(), "P.B": dB.clone()}
        term.gradient_(gradient, state, context)
        for name, move in gradient.items():
            state[name] = state[name] + move
        term.prox_(state, context)
        yield S.clone(state), gradient, context.restart


def test_pieces_end_after_the_longest_inner_loop_and_only_one_row_and_column_move(adapted, fit):
    model = adapted(LoRA, rank=4)
    start = trainable(model)
    term = Growth(longest=3)
    ends = {steps: fit(model, term, steps=steps, weight_decay=0.1)[0] for steps in range(1, 10)}
    for steps, end in ends.items():
        j = (steps - 1) // 3  # the piece that trained at this step
        before = ends.get(steps - 1, start)
        for key in keys(model, list(start)).values():
            moved = end[key.name] != before[key.name]
            moved = moved.any(1) if key.factor == "A" else moved.any(0)
            expected = torch.arange(4) == j
            assert torch.equal(moved | (steps % 3 == 1), expected | (steps % 3 == 1)), (key.name, steps)
            assert not (moved & ~expected).any(), (key.name, steps)
        assert set(ranks(end).values()) == {j + 1}
