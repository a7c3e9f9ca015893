"""DP-FedAvg: no client moves the mean by more than C/m, noise of the promised size, a norm that finds its quantile."""

import math

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.private import NORM, ROUND, ClientDP
from fedlora_mini.federation.exchange import Update

SHAPES = {"a.A": (2, 5), "a.B": (7, 2)}


def server(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in SHAPES.items()}


def updates(lengths, start, weight=1.0):
    g = torch.Generator().manual_seed(1)
    out = []
    for k, length in enumerate(lengths):
        change = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}
        moved = S.add(start, S.scale(change, length / S.norm(change)))
        out.append(Update(k, {name: value.to(start[name].dtype) for name, value in moved.items()}, weight))
    return out


def test_without_noise_it_is_the_mean_of_clipped_changes():
    start, C = server(), 0.5
    told = updates([0.1, 0.4, 2.0, 30.0], start)
    expected = S.scale(start, 0.0)
    for update in told:
        change = S.sub(update.state, start)
        expected = S.add(expected, change, min(1.0, C / S.norm(change)) / 4)
    found = ClientDP(0.0, 4, C)(start, told)
    assert S.norm(S.sub({n: found[n] for n in start}, S.add(start, expected))) < 1e-12


def test_without_clipping_either_it_is_the_plain_mean_whatever_the_weights():
    start = server()
    told = [
        Update(u.client, u.state, weight) for u, weight in zip(updates([1.0, 2.0], start), (1.0, 50.0), strict=True)
    ]
    found = ClientDP(0.0, 2, 1e9)(start, told)
    mean = S.mean([u.state for u in told], [1.0, 1.0])
    assert S.norm(S.sub({n: found[n] for n in start}, mean)) < 1e-12


@pytest.mark.parametrize("gone", range(4))
def test_one_client_more_moves_it_by_at_most_C_over_m(gone):
    start, rule = server(), ClientDP(0.0, 4, 0.3)
    told = updates([0.1, 5.0, 0.3, 80.0], start)
    both = [rule(start, some) for some in (told, told[:gone] + told[gone + 1 :])]
    assert S.norm(S.sub(*({n: out[n] for n in start} for out in both))) <= 0.3 / 4 * (1 + 1e-9)


def test_nobody_drawn_is_noise_of_deviation_sigma_C_over_m():
    start = {"a.A": torch.zeros(100, 200)}
    found = ClientDP(2.0, 5, 0.1)(start, [])["a.A"]
    assert found.dtype == torch.float32 and found.std() == pytest.approx(2.0 * 0.1 / 5, rel=0.02)


def test_rounds_draw_their_own_noise_and_repeat_by_seed():
    start = server()
    one = ClientDP(1.0, 2, 0.1)(start, [])
    assert int(one[ROUND]) == 1
    again = ClientDP(1.0, 2, 0.1)(start, [])
    assert S.digest(one) == S.digest(again)
    second = ClientDP(1.0, 2, 0.1)(start | {ROUND: one[ROUND]}, [])
    other = ClientDP(1.0, 2, 0.1, seed=1)(start, [])
    assert len({S.digest({n: out[n] for n in start}) for out in (one, second, other)}) == 3
    secure = [ClientDP(1.0, 2, 0.1, secure=True)(start, []) for _ in range(2)]
    assert S.digest(secure[0]) != S.digest(secure[1])


def test_an_adaptive_norm_goes_to_the_quantile():
    start, lengths = server(), [0.02 * 1.3**k for k in range(21)]
    rule, state = ClientDP(0.0, 21, 5.0, quantile=0.5), server()
    for _ in range(100):
        state = state | {k: v for k, v in rule(state | start, updates(lengths, start)).items() if k in (NORM, ROUND)}
    assert lengths[9] <= float(state[NORM]) <= lengths[11]


def test_both_releases_together_cost_what_sigma_costs():
    rule = ClientDP(0.8, 100, 0.1, quantile=0.5)
    assert rule.sum_sigma > 0.8
    assert rule.sum_sigma**-2 + (2 * rule.count_noise) ** -2 == pytest.approx(0.8**-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"C": 0.0}, "C must be positive"),
        ({"sigma": -1.0}, "sigma"),
        ({"quantile": 1.0}, "quantile"),
        ({"quantile": 0.5, "clients": 4, "sigma": 1.0}, "count alone"),
        ({"clients": math.nan}, "clients"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(FedloraError, match=message):
        ClientDP(**given)
