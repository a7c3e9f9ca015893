"""AdaLoRA's budget: against a loop over single numbers, and in training how many directions live, where and when."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters.base import trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import Schedule
from fedlora_mini.regularizers.base import Context
from fedlora_mini.regularizers.budget import RankBudget, cubic
from fedlora_mini.regularizers.orthogonal import Orthogonality


def alive(state):
    return {name: value != 0 for name, value in state.items() if name.endswith(".v")}


def count(state):
    return sum(int(mask.sum()) for mask in alive(state).values())


def test_the_cubic_schedule():
    T, t_i, t_f, b_0, b_T = 50, 5, 15, 64, 10
    found = [cubic(t, T, t_i, t_f, b_0, b_T) for t in range(1, T + 1)]
    for t, b in enumerate(found, 1):
        if t <= t_i:
            assert b == b_0
        elif t >= T - t_f:
            assert b == b_T
        else:
            assert b == int(b_T + (b_0 - b_T) * (1 - (t - t_i) / (T - t_i - t_f)) ** 3)
    assert found == sorted(found, reverse=True)
    assert found[t_i + 14] < (b_0 + b_T) / 2  # at the middle an eighth of the way is left: fast first, slow later


class Loop:
    """The formulas of AdaLoRA, one number at a time: I, its averages, the triplets, the top b."""

    def __init__(self, term, T, paths):
        self.term, self.T, self.paths, self.mean, self.deviation = term, T, paths, {}, {}
        self.frozen = None

    def score(self, name, *index):
        return self.mean[(name, *index)] * self.deviation[(name, *index)]

    def step(self, t, state, gradient, moved):
        """Returns `moved`, the state after the optimiser's step, with v masked."""
        term, T = self.term, self.T
        t_i, t_f = round(term.warm * T), round(term.cool * T)
        for name in state if self.frozen is None else ():
            for index in itertools.product(*(range(size) for size in state[name].shape)):
                key, I = (name, *index), abs(float(state[name][index]) * float(gradient[name][index]))
                self.mean[key] = term.beta1 * self.mean.get(key, 0.0) + (1 - term.beta1) * I
                away = abs(I - self.mean[key])
                self.deviation[key] = term.beta2 * self.deviation.get(key, 0.0) + (1 - term.beta2) * away
        if t < T - t_f and (t <= t_i or t % term.every):
            return moved
        if self.frozen is None:
            triplets = []
            for p in self.paths:
                (r, n), m = state[f"{p}.A"].shape, len(state[f"{p}.B"])
                for i in range(r):
                    value = self.score(f"{p}.v", i)
                    value += sum(self.score(f"{p}.B", j, i) for j in range(m)) / m
                    value += sum(self.score(f"{p}.A", i, j) for j in range(n)) / n
                    triplets.append((value, f"{p}.v", i))
            b_0 = len(triplets) if term.start is None else round(term.start * len(self.paths))
            b = cubic(t, T, t_i, t_f, b_0, round(term.final * len(self.paths)))
            self.kept = {(name, i) for _, name, i in sorted(triplets, reverse=True)[:b]}
            if t >= T - t_f:
                self.frozen = self.kept
        for p in self.paths:
            for i in range(len(moved[f"{p}.v"])):
                if (f"{p}.v", i) not in self.kept:
                    moved[f"{p}.v"][i] = 0
        return moved


@pytest.mark.parametrize("start", [None, 2.5])
def test_it_is_the_loop(start):
    """Two layers of different rank and shape, random gradients, plain gradient steps."""
    g, T = torch.Generator().manual_seed(0), 20
    term = RankBudget(1.5, start, warm=0.1, cool=0.2, every=3, beta1=0.8, beta2=0.7)
    layers = {"p": Diagonal(nn.Linear(5, 4), 3), "q": Diagonal(nn.Linear(2, 6), 4)}
    shapes = {f"{p}.{f}": getattr(layer, f).shape for p, layer in layers.items() for f in layer.factors}
    state = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    other, loop, memory, counts = S.clone(state), Loop(term, T, list(layers)), {}, []
    for t in range(1, T + 1):
        gradient = {name: torch.randn(value.shape, generator=g).double() for name, value in state.items()}
        context = Context(1, t, {}, {}, 0.1, T, layers=layers, memory=memory)
        context = replace(context, moves=frozenset(gradient))
        term.gradient_(gradient, state, context)
        moved = S.add(other, gradient, -0.1)
        state = S.add(state, gradient, -0.1)
        term.prox_(state, context)
        other = loop.step(t, other, gradient, moved)
        assert all(torch.equal(state[name], other[name]) for name in state), t
        for name, value in state.items():
            scores = [loop.score(name, *index) for index in itertools.product(*map(range, value.shape))]
            assert memory["budget"].score(name).flatten().tolist() == pytest.approx(scores, rel=1e-9)
        counts.append(count(state))
    assert counts[:2] == [7, 7] and counts[2] < 7  # warm up, then a first mask at step 3
    assert counts[3] == 7  # between masks what was zero trains on
    assert counts[15:] == [3] * 5  # frozen


def test_the_budget_is_met_at_the_end_and_layers_share_it(adapted, fit):
    model = adapted(Diagonal, rank=4, start="unit")
    [end] = fit(model, RankBudget(1.5, every=2), steps=12)
    ranks = [int(mask.sum()) for mask in alive(end).values()]
    assert sum(ranks) == round(1.5 * len(ranks))
    assert len(set(ranks)) > 1


@pytest.mark.slow
def test_the_number_of_directions_follows_the_schedule_and_the_last_mask_stays(adapted, fit):
    """The same training broken off after 1, 2, … steps."""
    model, T = adapted(Diagonal, rank=4, start="unit"), 16
    d = 4 * len(alive(trainable(model)))
    b_T, ends = d // 4, {}
    for t in range(3, T + 1):
        [ends[t]] = fit(model, RankBudget(1, warm=1 / 8, cool=1 / 4, every=4, total=T), steps=t)
    for t, end in ends.items():
        masked = t > 2 and (t % 4 == 0 or t >= 12)
        assert count(end) == (cubic(t, T, 2, 4, d, b_T) if masked else d), t
    last = alive(ends[T])
    assert all(torch.equal(mask, alive(ends[t])[name]) for t in range(12, T) for name, mask in last.items())


def test_a_frozen_pattern_outlives_the_round(adapted, fit):
    """Memory ends with the round, and AdaLoRA's orthogonality gives masked directions a gradient: they stay zero."""
    model = adapted(Diagonal, rank=4, start="unit")
    term, state, patterns = RankBudget(1, cool=0.5, every=2, total=18), None, []
    for round in (1, 2, 3, 4):
        [state] = fit(model, Orthogonality(10.0), term, round=round, start=state, steps=6)
        patterns.append(alive(state))
    assert count(state) == len(patterns[0])
    for name in patterns[1]:
        assert torch.equal(patterns[1][name], patterns[2][name]) and torch.equal(patterns[1][name], patterns[3][name])


def test_it_leaves_everything_but_v_alone(adapted, fit):
    model = adapted(Diagonal, rank=4, start="unit", noise=0.1)
    [plain], [masked] = (fit(model, *terms, steps=4) for terms in ((), (RankBudget(1, every=4, cool=0),)))
    for name, value in masked.items():
        if not name.endswith(".v"):
            assert torch.equal(value, plain[name])
        assert torch.equal(value[value != 0], plain[name][value != 0])


def test_a_v_that_stands_still_keeps_its_bits(adapted, fit):
    """v moves at odd steps only: a mask that falls on an even one waits."""
    model = adapted(Diagonal, rank=4, start="unit")
    odd = Schedule("v at odd steps", lambda key, round, step, steps: key.factor != "v" or step % 2 == 1)
    d = 4 * len(alive(trainable(model)))
    for steps, directions in ((6, d), (7, d // 4), (8, d // 4)):
        [end] = fit(model, RankBudget(1, cool=0.25, every=2, total=8), schedule=odd, steps=steps)
        assert count(end) == directions


def test_grouped_clients_end_like_sequential_ones_and_always_alike(adapted, fit):
    """Each client has its own importances and its own mask."""
    model = adapted(Diagonal, torch.float64, rank=3, start="unit")
    ends = [fit(model, RankBudget(1, every=2), clients=3, grouped=g, steps=8) for g in (False, True, True)]
    assert S.digest(ends[1]) == S.digest(ends[2])
    for one, other in zip(ends[0], ends[1], strict=True):
        assert S.norm(S.sub(one, other)) < 1e-7 * S.norm(one)
    masks = [torch.cat(list(alive(end).values())) for end in ends[1]]
    assert not torch.equal(masks[0], masks[1])


def test_errors(adapted, fit):
    with pytest.raises(FedloraError, match="0 < final <= start"):
        RankBudget(4, start=2)
    with pytest.raises(FedloraError, match="sum below 1"):
        RankBudget(4, warm=0.5, cool=0.5)
    with pytest.raises(FedloraError, match="every must be at least 1"):
        RankBudget(4, every=0)
    with pytest.raises(FedloraError, match="needs layers adapted by Diagonal; adapters here: LoRA"):
        fit(adapted(LoRA, rank=2), RankBudget(1))
