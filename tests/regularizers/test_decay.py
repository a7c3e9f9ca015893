"""Weight decay and the FedProx anchor: penalties by finite differences, the proximal step by its definition."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini.adapters.base import Key
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.schedule import only
from fedlora_mini.regularizers import Anchor, Context, WeightDecay


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def setting():
    state = {"P.A": draw(2, 5), "P.v": draw(2, seed=1), "P.B": draw(4, 2, seed=2)}
    start = {name: draw(*value.shape, seed=9) for name, value in state.items()}
    return state, Context(1, 1, start, {n: Key("P", n[-1], "encoder", "linear") for n in state}, 0.1)


def test_smooth_decay_is_half_the_squares_of_the_chosen_factors(setting):
    state, c = setting
    value = WeightDecay(0.6, ("A", "v"), "smooth").penalty(state, c)
    assert value.item() == pytest.approx(0.3 * sum(float((state[n] ** 2).sum()) for n in ("P.A", "P.v")))
    assert WeightDecay(0.6).penalty(state, c) == 0


@pytest.mark.parametrize("term", [WeightDecay(0.6, ("A", "B"), "smooth"), Anchor(0.7)], ids=["decay", "anchor"])
def test_gradients_agree_with_finite_differences(setting, term):
    state, c = setting
    names = list(state)

    def value(*tensors):
        return term.penalty(dict(zip(names, tensors, strict=True)), c)

    assert torch.autograd.gradcheck(value, tuple(state[name].requires_grad_() for name in names))


def test_the_proximal_step_shrinks_what_moves_and_nothing_else(setting):
    state, c = setting
    after = {name: value.clone() for name, value in state.items()}
    term = WeightDecay(5.0)
    c = replace(c, moves=frozenset({"P.A": state["P.A"], "P.v": state["P.v"]}))
    term.gradient_({"P.A": state["P.A"], "P.v": state["P.v"]}, after, c)
    term.prox_(after, c)
    assert torch.allclose(after["P.A"], state["P.A"] / 1.5, rtol=1e-15)
    assert torch.equal(after["P.v"], state["P.v"]) and torch.equal(after["P.B"], state["P.B"])


def test_under_sgd_both_forms_are_the_same_to_first_order(adapted, fit):
    ends = {}
    for mu in (0.1, 0.01):
        for form in ("proximal", "smooth"):
            model = adapted(LoRA, torch.float64, noise=0.1)
            [ends[form]] = fit(model, WeightDecay(mu, form=form), optimiser="sgd", lr=0.1, steps=1)
        gap = max(float((ends["proximal"][n] - ends["smooth"][n]).abs().max()) for n in ends["smooth"])
        assert gap < 0.1 * mu * 0.1  # each moves θ by lr mu θ


def test_a_schedule_that_holds_a_factor_still_is_obeyed(adapted, fit):
    from fedlora_mini.adapters.base import trainable

    model = adapted(LoRA, noise=0.1)
    start = trainable(model)
    [end] = fit(model, WeightDecay(1.0), schedule=only("B"), steps=2)
    assert all(torch.equal(start[name], end[name]) == name.endswith(".A") for name in start)


def test_factors_and_forms_that_do_not_exist_are_named(setting):
    state, c = setting
    with pytest.raises(FedloraError, match="needs factors g; factors here: A, B, v"):
        WeightDecay(on=("g",), form="smooth").penalty(state, c)
    with pytest.raises(FedloraError, match="accepted: proximal, smooth"):
        WeightDecay(form="decoupled")
