"""Every term in local training: clients in one pass end like one after the other, and divergence stays visible."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.base import adapters, keys, trainable
from fedlora_mini.adapters.diagonal import Diagonal
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError
from fedlora_mini.regularizers import (
    L1,
    Anchor,
    Context,
    Diversity,
    GroupLasso,
    NuclearFrobenius,
    NuclearNorm,
    Orthogonality,
    WeightDecay,
)

BOTH = [
    Anchor(1.0),
    GroupLasso(2.0),
    GroupLasso(2.0, "B"),
    NuclearNorm(0.5),
    NuclearNorm(0.5, "smooth"),
    NuclearNorm(0.5, "variational"),
    NuclearFrobenius(0.5),
    NuclearFrobenius(0.5, -0.5, 0.3, form="smooth"),
    Orthogonality(1.0),
    WeightDecay(0.5),
    WeightDecay(0.5, form="smooth"),
]
ON_V = [
    L1(0.5),
    L1(0.5, rho=0.02, ramp=(1.0, 4)),
    L1(0.1, gauge="unit"),
    L1(0.2, step="adam", metric="adam"),
    L1.sora(1e-3),
]
CASES = [(LoRA, {"rank": 4}, term) for term in [*BOTH, Diversity(2, 1.0, 1.0)]]
CASES += [(Diagonal, {"rank": 4, "start": "gate"}, term) for term in [*BOTH, *ON_V]]
every_term = pytest.mark.parametrize(
    ("wrap", "options", "term"), CASES, ids=[f"{wrap.__name__}-{term!r}" for wrap, _, term in CASES]
)


@every_term
def test_clients_in_one_pass_end_like_clients_one_after_the_other(adapted, fit, wrap, options, term):
    model = adapted(wrap, torch.float64, noise=0.3, **options)
    assert term.grouped and term.label
    plain, alone, together = (
        fit(model, *terms, clients=2, steps=4, grouped=grouped)
        for terms, grouped in (((), True), ((term,), False), ((term,), True))
    )
    for without, one, other in zip(plain, alone, together, strict=True):
        assert S.norm(S.sub(one, other)) < 1e-8 * S.norm(one)
        assert S.norm(S.sub(one, without)) > 1e-6 * S.norm(one)  # and the term did something
    assert S.norm(S.sub(*together)) > 1e-6 * S.norm(together[0])


def test_a_second_gradient_is_refused_along_the_group_axis(adapted, fit):
    model = adapted(Diagonal, rank=2)
    with pytest.raises(FedloraError, match="execution 'sequential'"):
        fit(model, L1(order="gauss_seidel"), clients=2, grouped=True)
    assert len(fit(model, L1(order="gauss_seidel"), clients=2, steps=1)) == 2


@every_term
def test_a_client_that_diverged_is_neither_mended_nor_an_error(adapted, wrap, options, term):
    """The federation refuses its update afterwards; a step that cuts NaN to zero would hide it."""
    model = adapted(wrap, **options)
    state = {name: torch.full_like(value, float("nan")) for name, value in trainable(model).items()}
    context = Context(1, 1, S.clone(state), keys(model, list(state)), 0.1, layers=dict(adapters(model)))
    loss = term.penalty({name: value.clone().requires_grad_() for name, value in state.items()}, context)
    assert loss == 0 or loss.isnan()
    context = replace(context, moves=frozenset(S.clone(state)))
    term.gradient_(S.clone(state), state, context)
    term.prox_(state, context)
    assert not any(value.isfinite().any() for value in state.values())


def test_two_terms_of_one_kind_keep_their_own_memory(adapted, fit):
    """One L1 on v and another on A: together they leave neither factor to the optimiser."""
    model = adapted(Diagonal, rank=2, start="gate", noise=0.1)
    start = trainable(model)
    [end] = fit(model, L1(1e4), L1(0.0, factor="A", rho=0.0), steps=2)
    assert all(not end[name].any() for name in end if name.endswith(".v"))
    assert all(torch.equal(end[name], start[name]) for name in end if name.endswith(".A"))
