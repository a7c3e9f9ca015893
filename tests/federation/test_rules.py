"""Every server rule against a brute-force oracle, and what all of them have in common."""

import weakref
from types import FunctionType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import Update, aggregation
from fedlora_mini.federation.aggregation import (
    Fair,
    FedAdam,
    FedAvgM,
    Krum,
    Nova,
    Others,
    Selection,
    Stack,
    TrimmedMean,
    masked,
    mean,
    median,
    padded,
    prototypes,
    residual,
    svd,
    uniform,
    weighted,
)
from fedlora_mini.federation.aggregation.selection import SCORE

LAYERS = {"encoder.qkv": (7, 5), "decoder.conv": (4, 9)}  # m, n
RANK, WEIGHTS = 3, (3.0, 1.0, 2.0, 5.0, 4.0)


def named(rule):
    """A rule's id: its bare name, the same in every process."""
    return getattr(rule, "__name__", type(rule).__name__)


RULES = {
    "mean": mean,
    "uniform": uniform,
    "Others": Others(),
    "stack": Stack(),
    "padded": padded,
    "svd": svd,
    "residual": residual,
    "Fair": Fair(),
    "Fair, optimised": Fair(solve="optimised"),
    "median": median,
    "TrimmedMean": TrimmedMean(),
    "Krum": Krum(),
    "Krum, multi": Krum(multi=3),
    "FedAvgM": FedAvgM(),
    "FedAdam": FedAdam(),
    "FedAvgM of padded": FedAvgM(inner=padded),
    "Nova": Nova(),
    "Nova, momentum": Nova(momentum=0.9),
    "Selection": Selection(),
    "weighted": weighted,
    "masked": masked,
    "prototypes": prototypes,
}
HELPERS = {"AggregationError", "aggregation_error", "self_pruned_rank", "tail", "truncate"}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def state(seed, rank=RANK, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"head.D": (2, 3), "head.d": (2,)}
    for path, (m, n) in LAYERS.items():
        shapes |= {f"{path}.A": (rank, n), f"{path}.B": (m, rank)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def messages(rule, client, seed):
    """What the clients of a rule say beside their tensors."""
    rng = torch.Generator().manual_seed(100 + seed)
    if rule is weighted:
        return {"~weight": torch.tensor(1.0 + seed)}
    if isinstance(rule, Selection):
        return {f"{SCORE}{path}": torch.rand((), generator=rng, dtype=torch.float64) for path in LAYERS}
    if rule is masked:
        return {f"{n}~mask": torch.rand(v.shape, generator=rng) > 0.4 for n, v in client.items() if n != "head.d"}
    if rule is prototypes:
        return {"~prototype": torch.randn(3, 4, generator=rng), "~count": torch.tensor([seed, 2 * seed, 0])}
    return {}


def clients(rule=mean, same=False, dtype=torch.float64, ranks=(RANK,) * 5, steps=(4, 1, 7, 2, 2), scale=1.0):
    out = []
    for k, (weight, rank, tau) in enumerate(zip(WEIGHTS, ranks, steps, strict=False)):
        own = state(0 if same else k, rank, dtype)
        out.append(Update(k, own | messages(rule, own, 0 if same else k), scale * weight, 0.5, steps=tau))
    return out


def product(out, path):
    """The change of W that a result stands for."""
    m, n = LAYERS[path]
    total = torch.zeros(m, n, dtype=torch.float64)
    for name in (path, f"{path}.fold"):
        if f"{name}.A" in out:
            total += out[f"{name}.B"].double() @ out[f"{name}.A"].double()
    return total


def assert_same_model(found, expected, rtol=1e-8):
    """Equal tensors, and of the layers equal products: stacked and rotated pairs are equal."""
    plain, wanted = (S.pick(s, lambda n: not n.startswith(tuple(LAYERS))) for s in (found, expected))
    torch.testing.assert_close(plain, wanted, rtol=rtol, atol=1e-8)
    for path in LAYERS:
        torch.testing.assert_close(product(found, path), product(expected, path), rtol=rtol, atol=1e-8)


# What all rules have in common

HOLDING = {"Others", "stack", "svd", "residual", "Fair", "Fair, optimised"}  # thin factors of all, or a copy for each
HOLDING |= {"median", "TrimmedMean", "Krum", "Krum, multi"}  # an order over all


@every_rule
def test_a_rule_lets_go_of_every_update_before_the_next_unless_it_needs_them_all(rule):
    """Of five, it has at most the one at hand and the one before it."""
    alive, most = set(), 0

    def arriving():
        nonlocal most
        for k in range(5):
            update = clients(rule)[k]
            for name, value in update.state.items():
                alive.add((k, name))
                weakref.finalize(value, alive.discard, (k, name))
            most = max(most, len({client for client, _ in alive}))
            yield update
            del update, value

    rule(state(9), arriving())
    assert most == (5 if rule in [RULES[name] for name in HOLDING] else 2)


def test_every_public_rule_is_among_those_tested():
    tested = {rule.__name__ if isinstance(rule, FunctionType) else type(rule).__name__ for rule in RULES.values()}
    assert tested == set(aggregation.__all__) - HELPERS


@every_rule
def test_the_order_of_updates_changes_nothing(rule):
    updates = clients(rule)
    first, second = rule(state(9), updates), rule(state(9), [updates[k] for k in (3, 0, 4, 2, 1)])
    assert_same_model(first, second)


@every_rule
def test_the_unit_of_the_weights_changes_nothing(rule):
    found, expected = rule(state(9), clients(rule, scale=7.3)), rule(state(9), clients(rule))
    assert_same_model(*(S.pick(out, lambda n: not n.endswith("/weight")) for out in (found, expected)))


@every_rule
def test_equal_clients_give_themselves(rule):
    """At equal steps, without memory; Adam's step is no mean and is tested against its own loop."""
    if isinstance(rule, FedAdam):
        pytest.skip("steps by sign rather than by size")
    updates = clients(rule, same=True, steps=(4,) * 5)
    if rule is masked:
        updates = [
            Update(u.client, {n: v.fill_(1) if v.dtype == torch.bool else v for n, v in u.state.items()}, 1.0)
            for u in updates
        ]
    found = {n: v for n, v in rule(state(9), updates).items() if "~" not in n}
    assert_same_model(found, state(0))


@every_rule
def test_updates_may_come_from_a_generator_and_stay_as_they_are(rule):
    updates, server = clients(rule), state(9)
    held = [S.digest(u.state) for u in updates], S.digest(server)
    assert S.digest(rule(server, (u for u in updates))) == S.digest(rule(server, updates))
    assert held == ([S.digest(u.state) for u in updates], S.digest(server))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_stays_and_rounding_is_the_only_difference(rule, dtype):
    server, updates = state(9, dtype=dtype), clients(rule, dtype=dtype)
    wide = [
        Update(
            u.client,
            {n: v.double() if v.is_floating_point() else v for n, v in u.state.items()},
            u.weight,
            steps=u.steps,
        )
        for u in updates
    ]
    found, exact = rule(server, updates), rule({n: v.double() for n, v in server.items()}, wide)
    assert {v.dtype for n, v in found.items() if "~" not in n} == {dtype}
    for path in LAYERS:
        tolerance = 40 * torch.finfo(dtype).eps * product(exact, path).norm()
        assert (product(found, path) - product(exact, path)).norm() < tolerance


@every_rule
def test_unequal_ranks_are_for_the_rules_that_say_so(rule):
    updates = clients(rule, ranks=(1, 2, 3, 3, 2))
    if getattr(rule, "unequal", False):
        out = rule(state(9), updates)
        assert all(out[f"{path}.A"].shape == (RANK, n) for path, (_, n) in LAYERS.items() if rule != Stack())
    else:
        with pytest.raises(FedloraError, match=r"shape of '.*\.A'"):
            rule(state(9), updates)


def test_the_rules_for_unequal_ranks():
    assert {name for name, rule in RULES.items() if getattr(rule, "unequal", False)} == {
        "stack", "padded", "svd", "FedAvgM of padded",
    }  # fmt: skip
    assert getattr(Stack(), "fresh", False) and not getattr(svd, "fresh", False)


@pytest.mark.parametrize("rule", [Stack(), padded, svd], ids=named)
def test_one_client_of_a_lower_rank_keeps_the_size_of_its_product(rule):
    """One s for all ranks, so that B A alone says how large the update is."""
    [update] = clients(ranks=(2,))
    out = rule(state(9), [update])
    for path in LAYERS:
        torch.testing.assert_close(product(out, path), update.state[f"{path}.B"] @ update.state[f"{path}.A"])


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, value.numel() if isinstance(value, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("rule", [Stack(), padded, svd, residual, Fair(), Fair(solve="optimised")], ids=named)
def test_no_rule_on_products_forms_one(rule):
    m, n, r, K = 90, 80, 2, 3
    rng = torch.Generator().manual_seed(0)
    states = [{"l.A": torch.randn(r, n, generator=rng), "l.B": torch.randn(m, r, generator=rng)} for _ in range(K + 1)]
    with Largest() as largest:
        rule(states[K], [Update(k, states[k], 1.0) for k in range(K)])
    assert 0 < largest.numel <= K * r * m < m * n


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"head.D"}, "there is none"),
        ({"encoder.qkv.A"}, "'encoder.qkv' sends A"),
        ({"encoder.qkv.A", "encoder.qkv.B", "encoder.qkv.v"}, "sends A, B, v"),
    ],
)
def test_rules_on_products_want_whole_pairs(names, said):
    tensors = state(0) | {"encoder.qkv.v": torch.ones(RANK)}
    with pytest.raises(FedloraError, match=said):
        svd(state(9), [Update(0, S.pick(tensors, names.__contains__), 1.0)])


def test_a_pair_wider_than_the_server_is_refused_not_cut():
    with pytest.raises(FedloraError, match="rank 3 does not fit into the server's rank 2"):
        padded(state(9, rank=2), clients())


@pytest.mark.parametrize("rule", RULES.values(), ids=named)
def test_no_update_at_all_is_one_clear_error(rule):
    with pytest.raises(FedloraError, match=r"need|positive"):
        rule(state(9), [])


def test_every_rule_has_words_for_the_table():
    for rule in RULES.values():
        words = getattr(rule, "label", None) or (rule.__doc__ or "").splitlines()[0]
        assert 0 < len(words) < 80, words
