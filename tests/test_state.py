"""Arithmetic on states."""

import subprocess
import sys

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


@pytest.mark.parametrize(
    ("states", "weights"), [([], []), ([some()], [1, 2]), ([some()] * 2, [0, 0]), ([some()] * 2, [2, -1])]
)
def test_mean_refuses(states, weights):
    with pytest.raises(FedloraError, match="weight"):
        S.mean(states, weights)


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
