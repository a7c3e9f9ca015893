"""AROMA: against merging and starting anew by hand, and against a loop that decides when pieces and layers end."""

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, delta_of, load_state, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.growth import Growth


def ranks(state):
    return [int(B.any(0).sum()) for name, B in state.items() if name.endswith(".B")]


def weights(model, state):
    """W_0 + ΔW of every layer."""
    return {
        path: layer.base.weight.detach() + delta_of(layer, {f: state[f"{path}.{f}"] for f in layer.factors})
        for path, layer in adapters(model)
    }


def test_it_is_merging_into_W_and_starting_a_new_piece_with_a_new_optimiser(adapted, fit):
    """Three pieces of a store of four; the oracle is a LoRA of rank one that is merged and set back by hand."""
    store = adapted(LoRA, torch.float64, rank=4)
    start = trainable(store)
    [end] = fit(store, Growth(longest=3), steps=9)
    assert set(ranks(end)) == {3}
    single = adapted(LoRA, torch.float64, rank=1)
    for j in range(3):
        piece = {name: t[j : j + 1] if name.endswith(".A") else t[:, j : j + 1] for name, t in start.items()}
        [piece] = fit(single, start=piece, round=j + 1, steps=3)
        load_state(single, piece)
        with torch.no_grad():
            for _, layer in adapters(single):
                layer.base.weight += layer.delta()
    merged = {path: layer.base.weight.detach() for path, layer in adapters(single)}
    found, before = weights(store, end), weights(store, start)
    assert S.norm(S.sub(found, merged)) < 1e-9 * S.norm(S.sub(merged, before))


def test_one_row_and_one_column_move_and_the_finished_keep_their_bits(adapted, fit):
    """Also under weight decay, which moves what has no gradient. The same training broken off after 1, 2, … steps."""
    model = adapted(LoRA, rank=4)
    before = trainable(model)
    for steps in range(1, 13):
        [end] = fit(model, Growth(longest=3), steps=steps, weight_decay=0.1)
        j = (steps - 1) // 3
        assert set(ranks(end)) == {j + 1}
        for name in end:
            moved = end[name] != before[name]
            moved = moved.any(1) if name.endswith(".A") else moved.any(0)
            assert torch.equal(moved, torch.arange(4) == j), (name, steps)
        before = end


def test_a_full_layer_stands_still(adapted, fit):
    model = adapted(LoRA, rank=2)
    [full], [later] = (fit(model, Growth(longest=2), steps=steps, weight_decay=0.1) for steps in (4, 7))
    assert S.digest(full) == S.digest(later)


def test_a_new_round_goes_on_after_the_last_piece(adapted, fit):
    model = adapted(LoRA, rank=3)
    state, term = trainable(model), Growth()
    for round in (1, 2, 3, 4):
        [end] = fit(model, term, start=state, round=round, steps=2)
        assert set(ranks(end)) == {min(round, 3)}
        for name in end:
            moved = (end[name] != state[name]).any(1 if name.endswith(".A") else 0)
            assert torch.equal(moved, torch.arange(3) == round - 1)
        state = end


class Loop:
    """W itself, and the pieces that are merged into it: what the paper says, without a store."""

    def __init__(self, term, W, A, s):
        self.term, self.W, self.rows, self.s = term, W, list(A), s
        self.changes, self.stopped, self.pieces = [], False, 0
        self.start()

    def start(self):
        if not self.rows:
            self.stopped = True
            return
        self.a, self.b, self.age = self.rows.pop(0).clone(), torch.zeros(len(self.W), dtype=self.W.dtype), 0
        self.last = torch.zeros_like(self.W)

    def step(self, da, db):
        """Returns whether the piece was merged."""
        term = self.term
        self.a, self.b, self.age = self.a + da, self.b + db, self.age + 1
        ends = self.age == term.longest
        if self.age % term.check == 0 and not ends:
            now = self.b[:, None] * self.a
            ends = (now - self.last).norm() <= term.inner_tol * self.last.norm()
            self.last = now
        if not ends:
            return False
        new = self.W + self.s * self.b[:, None] * self.a
        self.changes.append(float((new - self.W).norm() / self.W.norm()))
        self.W, self.pieces = new, self.pieces + 1
        recent = self.changes[-term.window :]
        self.start()
        if len(recent) == term.window and sum(recent) / len(recent) < term.outer_tol:
            self.stopped = True
        return True


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("outer_tol", [0.02, 1e-9], ids=["small pieces", "store full"])
def test_when_pieces_and_layers_end(outer_tol, seed):
    """Given moves in place of an optimiser: they grow (even pieces) or shrink (odd ones); every piece is smaller."""
    g = torch.Generator().manual_seed(seed)
    term = Growth(check=2, inner_tol=0.3, longest=9, outer_tol=outer_tol, window=2)
    layer = LoRA(nn.Linear(5, 4).double(), 6, alpha=3.0, generator=g)
    nn.init.normal_(layer.base.weight, generator=g)
    state = {"P.A": layer.A.detach().clone(), "P.B": layer.B.detach().clone()}
    loop, memory, ages = Loop(term, layer.base.weight.detach().clone(), state["P.A"], 0.5), {}, []
    for step in range(1, 60):
        context = Context(1, step, {}, {}, 0.1, 60, layers={"P": layer}, memory=memory)
        j, stopped, age, before = loop.pieces, loop.stopped, loop.age, S.clone(state)
        size = (0.7 if j % 2 else 1.2) ** age * 0.3**j
        move = {name: size * torch.randn(value.shape, generator=g).double() for name, value in state.items()}
        merged = not stopped and loop.step(move["P.A"][j], move["P.B"][:, j])
        term.gradient_(move, state, context)
        state = {name: value + move[name] if name in move else value for name, value in state.items()}
        term.prox_(state, context)
        assert context.restart == ({"P.A", "P.B"} if merged else set()), step
        if merged:
            ages.append(age + 1)
            W = layer.base.weight.detach() + 0.5 * state["P.B"] @ state["P.A"]
            assert torch.allclose(W, loop.W, rtol=1e-12)
        if stopped:
            assert not move and S.digest(state) == S.digest(before)
        else:
            assert set(move["P.A"].any(1).nonzero().flatten().tolist()) == {j}
            assert set(move["P.B"].any(0).nonzero().flatten().tolist()) == {j}
    assert memory["growth"]["P"].changes == pytest.approx(loop.changes, rel=1e-9)
    assert loop.stopped and loop.pieces == ranks(state)[0] == len(ages)
    if outer_tol == 1e-9:
        assert len(ages) == 6 and 9 in ages and min(ages) < 9  # both ways of ending an inner loop have happened
    else:
        assert len(ages) < 6


def test_a_piece_without_a_gradient_ends_at_the_first_check(adapted, fit):
    """Nothing changes at all: the ratio 0 / 0 counts as small."""
    layer, memory = LoRA(nn.Linear(3, 2), 2), {}
    state, term = {"P.A": layer.A.detach().clone(), "P.B": layer.B.detach().clone()}, Growth(check=2)
    for step in (1, 2):
        context = Context(1, step, {}, {}, 0.1, 2, layers={"P": layer}, memory=memory)
        term.gradient_(S.scale(state, 0.0), state, context)
        term.prox_(state, context)
        assert bool(context.restart) == (step == 2)


def test_the_same_seed_twice_gives_the_same_bytes(adapted, fit):
    model = adapted(LoRA, rank=3)
    assert S.digest(fit(model, Growth(longest=2))) == S.digest(fit(model, Growth(longest=2)))


def test_errors(adapted, fit):
    with pytest.raises(FedloraError, match="check must be at least 1"):
        Growth(check=0)
    with pytest.raises(FedloraError, match="one after the other"):
        fit(adapted(LoRA, rank=2), Growth(), clients=2, grouped=True)
    with pytest.raises(FedloraError, match="needs layers adapted by LoRA; adapters here: Diagonal"):
        fit(adapted(Diagonal, rank=2), Growth())
