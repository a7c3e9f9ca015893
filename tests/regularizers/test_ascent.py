"""The gradient at w + alpha g / ||g||, by hand, and that the ascent leaves no trace."""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.schedule import Schedule, together
from fedlora_mini.federation.sharing import everything
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.regularizers import Context, Regularizer
from fedlora_mini.regularizers.ascent import Ascent

LR = 0.1


def network(name="minisam", adapter="full", **options):
    options = options or ({"d": 16, "depth": 1, "stem": 4, "width": 4} if name == "minisam" else {})
    return prepare(build(name, 2, **options), adapter).double()


def batch(step=1):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)).double()
    return x, (x[:, 0] > 0.6).to(torch.uint8)


def gradient(model, state, step=1, extra=lambda leaves: 0.0):
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    x, y = batch(step)
    value = segmentation_loss(call(model, leaves, x), y).mean() + extra(leaves)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def up(state, g, alpha):
    """w + alpha g / ||g||, the norm over everything at once."""
    length = torch.cat([each.flatten() for each in g.values()]).norm()
    return {name: value + alpha * g[name] / length if name in g else value for name, value in state.items()}


def fit(model, *terms, steps=1, schedule=together, **budget):
    own = trainable(model)
    method = Method("", "full", everything, schedule, objective=terms)
    size = Budget(**{"steps": steps, "batch": 2, "lr": LR, "optimiser": "sgd"} | budget)
    return train(model, method, keys(model, list(own)), [own], batch, size, 1)[0][0]


def same(a, b, tolerance=1e-12):
    return S.norm(S.sub(a, b)) < tolerance * S.norm(b)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("alpha", [0.05, 2.0])
def test_the_step_is_by_the_gradient_at_the_worst_near_point(adapter, alpha):
    model = network(adapter=adapter)
    state = trainable(model)
    for step in (1, 2):
        g = gradient(model, state, step)
        state = S.add(state, gradient(model, up(state, g, alpha), step), -LR)
    assert same(fit(model, Ascent(alpha), steps=2), state)
    assert not same(state, fit(model, steps=2), 1e-4)


def test_the_other_terms_belong_to_the_objective_that_is_climbed():
    class Square(Regularizer):
        def penalty(self, state, context):
            return 3 * sum(value.square().sum() for value in state.values())

    def extra(leaves):
        return 3 * sum(value.square().sum() for value in leaves.values())

    model = network()
    state = trainable(model)
    above = up(state, gradient(model, state, extra=extra), 0.5)
    expected = S.add(state, gradient(model, above, extra=extra), -LR)
    assert same(fit(model, Ascent(0.5), Square()), expected)


def test_only_what_moves_is_climbed():
    model = network(adapter="lora")
    state = trainable(model)
    g = S.pick(gradient(model, state), lambda name: name.endswith(".B"))
    there = S.pick(gradient(model, up(state, g, 1.0)), g.__contains__)
    expected = state | S.add(S.pick(state, g.__contains__), there, -LR)
    found = fit(model, Ascent(1.0), schedule=Schedule("B", lambda key, round, step, steps: key.factor == "B"))
    assert same(found, expected)
    assert all(torch.equal(found[name], state[name]) for name in state if name not in g)


def alone(state, again):
    """A step's context: nothing but the gradient at the state as it is."""
    return Context(1, 1, {}, {}, LR, again=again)


def test_the_state_has_its_bits_again_and_the_climb_has_the_length_alpha():
    rng = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(50, generator=rng),
        "b": torch.randn(3, 4, generator=rng),
        "n.running_mean": torch.ones(2),
    }
    before, seen = S.clone(state), []

    def again():
        seen.append(S.clone(state))
        state["n.running_mean"] += 1  # what a pass in training mode does
        return {"a": state["a"] * 2, "b": state["b"] * 2}

    gradient = {"a": torch.full((50,), 1e-3), "b": torch.zeros(3, 4)}
    Ascent(0.05).gradient_(gradient, state, alone(state, again))
    assert S.digest(state) == S.digest(before)
    assert S.norm(S.sub(seen[0], before)) == pytest.approx(0.05, rel=1e-5)
    assert torch.equal(gradient["a"], 2 * seen[0]["a"]) and torch.equal(gradient["b"], 2 * before["b"])


def test_what_another_term_took_out_of_the_gradient_stays_out():
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    gradient = {"a": torch.ones(2)}
    Ascent().gradient_(gradient, state, alone(state, lambda: {"a": torch.zeros(2), "b": torch.zeros(2)}))
    assert gradient.keys() == {"a"} and not gradient["a"].any()


def test_without_a_gradient_nothing_is_climbed():
    gradient = {"a": torch.zeros(2)}
    Ascent().gradient_(gradient, {"a": torch.ones(2)}, alone({}, lambda: pytest.fail("a second pass")))
    assert not gradient["a"].any()


def test_norms_keep_the_statistics_of_the_first_pass():
    """With batch norm: the running mean moves once a step, by the batch at w and not by that at the worst point."""
    model = network("attention_unet", features=(4, 8))
    plain, climbed = fit(model), fit(model, Ascent(5.0))
    statistics = [name for name in plain if name.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(plain[name], climbed[name]) for name in statistics)


def test_it_is_for_clients_one_after_the_other():
    model = network(adapter="lora")
    own = trainable(model)
    method = Method("", "lora", everything, objective=(Ascent(),))
    with pytest.raises(FedloraError, match=r"'gradient after an ascent of 0\.05' needs clients one after the other"):
        train(model, method, keys(model, list(own)), [own, own], batch, Budget(steps=1, batch=1), 1)


def test_weights_that_a_network_never_uses_stay():
    model = network("unetr")
    own, x = trainable(model), torch.rand(1, 3, 64, 64).double()
    method, y = Method("", "full", everything, objective=(Ascent(),)), (x[:, 0] > 0.5).to(torch.uint8)
    args = (keys(model, list(own)), [own], lambda step: (x, y), Budget(1, 1, LR, "sgd"), 1)
    [end], _ = train(model, method, *args)
    still = {name for name in own if torch.equal(end[name], own[name])}
    assert still and all("cross_attn" in name for name in still)
