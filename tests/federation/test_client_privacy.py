"""DP-FedAvg: no client moves the mean by more than C/m, noise of the promised size, a norm that finds its quantile."""

import math
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Server, federate
from fedlora_mini.federation.aggregation.private import NORM, ROUND, ClientDP
from fedlora_mini.federation.exchange import Update
from fedlora_mini.privacy import CLIPS, clip_sum

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


def test_with_a_quantile_both_releases_are_noised():
    """Nobody drawn: what is left of the sum is noise of its raised multiplier, of the count noise of deviation m/20."""
    start, rule = {"a.A": torch.zeros(100, 200)}, ClientDP(0.8, 10, 0.1, quantile=0.5)
    assert rule.sum_sigma > 1.3 * rule.sigma
    found = [replace(rule, seed=seed)(start, []) for seed in range(300)]
    assert found[0]["a.A"].std() == pytest.approx(rule.sum_sigma * 0.1 / 10, rel=0.02)
    moved = torch.stack([(out[NORM] / 0.1).log() for out in found]).double()  # -eta (1/2 + noise/m - quantile)
    assert moved.std() == pytest.approx(rule.eta * (rule.clients / 20) / rule.clients, rel=0.15)
    assert moved.mean().abs() < 4 * moved.std() / 300**0.5


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


@pytest.mark.parametrize("clipping", CLIPS)
def test_it_clips_as_the_one_clip_of_the_library_does(clipping):
    start, C = server(), 0.5
    told = updates([0.1, 0.4, 2.0, 30.0], start)
    changes = S.stack([S.sub(update.state, start) for update in told])
    expected = S.add(start, clip_sum(changes, C, clipping), 1 / 4)
    found = ClientDP(0.0, 4, C, clipping=clipping)(start, told)
    assert S.norm(S.sub({n: found[n] for n in start}, expected)) < 1e-12


@pytest.mark.parametrize("clipping", CLIPS)
def test_a_change_that_is_not_finite_counts_as_nothing(clipping):
    start, rule = server(), ClientDP(0.0, 3, 0.5, clipping=clipping)
    told = updates([0.1, 4.0, 2.0], start)
    told[1].state["a.B"][3, 1] = math.nan
    both = [rule(start, some) for some in (told, [told[0], told[2]])]
    assert all(torch.equal(both[0][n], both[1][n]) for n in start)


def test_a_client_that_is_not_finite_moves_the_adaptive_norm_like_any_other():
    start, rule = server(), ClientDP(0.0, 3, 0.5, quantile=0.5)
    told = updates([0.1, 4.0, 2.0], start)
    clipped = rule(start, told)[NORM]
    told[1].state["a.B"][3, 1] = math.inf
    assert torch.equal(rule(start, told)[NORM], clipped), "not inside the ball"


class Clients:
    """An engine whose clients answer what they are said to."""

    def __init__(self, told):
        self.clients, self.told = [update.client for update in told], told

    def exchange(self, requests):
        return [update for update in self.told if update.client in requests]


def rounds(rule, told, choose):
    start = {f"layer.{name}": value for name, value in server().items()}
    told = [
        Update(u.client, {f"layer.{n}": v for n, v in u.state.items()}, u.weight, loss=0.1 + u.client) for u in told
    ]
    keys = {name: Key(*name.rsplit(".", 1), "encoder", "linear") for name in start}
    row, own = replace(METHODS["fedit"], rule=rule), Server(start)
    return own, list(federate(row, Clients(told), own, keys, 2, 1, choose, lambda *_: 0.25))


def test_a_round_tells_nothing_of_its_clients_but_the_noised_mean():
    told = updates([0.1, 4.0, 2.0], server())
    told[1].state["a.B"][3, 1] = math.nan
    _, records = rounds(ClientDP(1.0, 3, 0.5), told, lambda t: [0, 1, 2])
    for record in records:
        assert record.loss is None and record.agg_err is None and record.refused == []
        assert record.clients == [0, 1, 2] and record.bytes_up > 0, "everybody takes part, whatever the data"


def test_nor_who_was_drawn():
    told, seen = updates([0.1, 4.0, 2.0], server()), []
    for draw in ([0, 2], []):
        _, records = rounds(ClientDP(1.0, 1.5, 0.5), told, lambda t, draw=draw: draw)
        seen.append([replace(record, round=0) for record in records])
    assert seen[0] == seen[1]
    assert {seen[0][0].clients, seen[0][0].bytes_up, seen[0][0].bytes_down, seen[0][0].seconds} == {None}


def test_a_client_that_is_not_finite_does_not_stop_a_run():
    told = updates([0.1], server())
    told[0].state["a.B"][3, 1] = math.nan
    ends = [rounds(ClientDP(1.0, 1, 0.5), told, lambda t, draw=draw: draw)[0].state for draw in ([0], [])]
    assert S.digest(ends[0]) == S.digest(ends[1])
    with pytest.raises(FedloraError, match="nobody answered"):
        rounds(ClientDP(1.0, 1, 0.5), [], lambda t: [0])


@pytest.mark.parametrize("length", [0.02, 0.1, 7.0])
def test_both_releases_together_cost_what_sigma_costs(length):
    """One client more moves sum and count, in units of their noises, by 1/sigma at most: at C and beyond."""
    m, C, sigma = 100, 0.1, 0.8
    start, rule = server(), ClientDP(sigma, m, C, quantile=0.5)
    silent = replace(rule, sigma=0.0)
    told = updates([0.03, 0.2, length], start)
    some, all_ = silent(start, told[:2]), silent(start, told)
    in_sum = m * S.norm(S.sub(*({n: out[n] for n in start} for out in (all_, some)))) / C
    in_count = m * float((all_[NORM] / some[NORM]).double().log()) / rule.eta
    assert abs(in_count) == pytest.approx(0.5, rel=1e-4) and in_sum == pytest.approx(min(1.0, length / C))
    apart = math.hypot(in_sum / rule.sum_sigma, in_count / rule.count_noise)
    assert rule.sum_sigma > sigma
    assert apart == pytest.approx(1 / sigma, rel=1e-4) if length >= C else apart < 1 / sigma


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"C": 0.0}, "C must be positive"),
        ({"sigma": -1.0}, "sigma"),
        ({"quantile": 1.0}, "quantile"),
        ({"quantile": 0.5, "clients": 4, "sigma": 1.0}, "count alone"),
        ({"clients": math.nan}, "clients"),
        ({"clipping": "flatt"}, "unknown way to clip 'flatt'.*'flat'"),
        ({"quantile": 0.5, "clients": 100, "clipping": "per-layer"}, "needs clipping 'flat', got 'per-layer'"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(FedloraError, match=message):
        ClientDP(**given)
