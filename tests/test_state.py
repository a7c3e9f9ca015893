"""Arithmetic on states."""

import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError


def some(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a.A": torch.randn(2, 3, generator=g), "b.d": torch.randn(4, generator=g)}


def test_vector_space():
    a, b = some(0), some(1)
    assert S.norm(S.sub(S.add(a, b), S.add(b, a))) == 0
    assert torch.equal(S.add(a, b, 2.0)["a.A"], a["a.A"] + 2 * b["a.A"])
    assert S.norm(S.sub(S.scale(a, 3.0), S.add(a, a, 2.0))) < 1e-6
    flat = torch.cat([value.flatten() for value in a.values()])
    assert S.norm(a) == pytest.approx(float(flat.norm()))
    assert (S.count(a), S.nbytes(a)) == (10, 40)


def test_mean_weighs_and_keeps_the_dtype():
    a, b = some(0), some(1)
    found = S.mean([a, b], [1, 3])
    assert torch.allclose(found["a.A"], 0.25 * a["a.A"] + 0.75 * b["a.A"])
    half = [{"a": torch.ones(2, dtype=torch.bfloat16)}] * 2
    assert S.mean(half, [1, 1])["a"].dtype == torch.bfloat16
    assert S.digest(S.mean([a], [5.0])) == S.digest(a)


def test_weighted_mean_is_that_of_numpy():
    states, weights = [some(k) for k in range(4)], [3, 1, 0, 7.5]
    found = S.weighted_mean(zip(states, weights, strict=True))
    for name in ("a.A", "b.d"):
        values = np.stack([state[name].double().numpy() for state in states])
        np.testing.assert_array_equal(found[name].numpy(), np.average(values, 0, weights).astype(np.float32))
    assert S.digest(found) == S.digest(S.mean(states, weights))


def test_weighted_mean_of_equal_states_is_that_state_to_the_bit():
    weights = [3.0, 5.0, 7.0, 11.0]
    assert S.digest(S.weighted_mean((some(), weight) for weight in weights)) == S.digest(some())


def test_weighted_mean_lets_go_of_every_state_before_the_next():
    alive, most = weakref.WeakSet(), 0

    def arriving():
        nonlocal most
        for k in range(6):
            state = some(k)
            alive.update(state.values())
            most = max(most, len(alive))
            yield state, 1.0
            del state

    S.weighted_mean(arriving())
    assert most <= 2 * 2  # this state and the one before


def test_weighted_mean_refuses_what_does_not_fit():
    wide = some() | {"a.A": torch.zeros(3, 3)}
    with pytest.raises(FedloraError, match=r"shape of 'a\.A': \(2, 3\), \(3, 3\)"):
        S.weighted_mean((state, 1.0) for state in (some(), wide))
    with pytest.raises(FedloraError, match=r"shape of 'a\.A'"):
        S.stack([some(), wide])
    with pytest.raises(FedloraError, match="differ in names"):
        S.weighted_mean((state, 1.0) for state in (some(), {"b.d": torch.zeros(4)}))
    with pytest.raises(FedloraError, match="non-negative"):
        S.weighted_mean([(some(), float("nan"))])


@pytest.mark.parametrize(
    ("states", "weights"), [([], []), ([some()], [1, 2]), ([some()] * 2, [0, 0]), ([some()] * 2, [2, -1])]
)
def test_mean_refuses(states, weights):
    with pytest.raises(FedloraError, match="weight"):
        S.mean(states, weights)


def test_no_state_at_all_is_one_clear_error():
    for act in (lambda: S.same_names([]), lambda: S.stack([])):
        with pytest.raises(FedloraError, match="at least one is needed, got none"):
            act()


def test_names_must_agree():
    other = some() | {"c.A": torch.zeros(1)}
    for act in (
        lambda: S.add(some(), other),
        lambda: S.mean([some(), other], [1, 1]),
        lambda: S.stack([some(), other]),
    ):
        with pytest.raises(FedloraError, match=r"differ in names.*c\.A"):
            act()


def test_stack_and_unstack():
    states = [some(k) for k in range(3)]
    stacked = S.stack(states)
    assert stacked["a.A"].shape == (3, 2, 3)
    assert [S.digest(s) for s in S.unstack(stacked)] == [S.digest(s) for s in states]
    with pytest.raises(FedloraError, match="group axes differ"):
        S.unstack({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})


def test_clone_shares_nothing_and_pick_picks():
    a = some()
    b = S.clone(a)
    b["a.A"].zero_()
    assert a["a.A"].any()
    assert set(S.pick(a, lambda name: name.endswith(".A"))) == {"a.A"}


def test_finite():
    a = some()
    assert S.finite(a)
    for bad in (float("nan"), float("inf")):
        a["b.d"][0] = bad
        assert not S.finite(a)


def test_digest_sees_values_names_shapes_and_dtypes():
    a = some()
    reference = S.digest(a)
    assert S.digest(dict(reversed(a.items()))) == reference  # not the order
    assert (
        S.digest({n: v.t().contiguous().t() if v.dim() == 2 else v for n, v in a.items()}) == reference
    )  # nor strides
    changed = S.clone(a)
    changed["a.A"][0, 0] += 1e-6
    others = [changed, {"x.A": a["a.A"], "b.d": a["b.d"]}, a | {"a.A": a["a.A"].reshape(3, 2)}]
    others += [a | {"a.A": a["a.A"].double()}, a | {"e": torch.zeros(0)}]
    assert len({reference, *(S.digest(other) for other in others)}) == 6
    assert S.digest([a, changed]) != S.digest([changed, a])


def test_import_is_light():
    """`import fedlora_mini` loads neither MONAI nor anything that only one part needs."""
    code = (
        "import sys, fedlora_mini, fedlora_mini.state, fedlora_mini.adapters, fedlora_mini.adapters.io, "
        "fedlora_mini.privacy, fedlora_mini.models.zoo, fedlora_mini.losses; "
        "print([m for m in ('monai', 'peft', 'opacus', 'flwr', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
