"""Audits of what `fedlora run` executes: private training, one by one and together, and rounds that protect clients.

Every client is a game: it has a loud canary, or an empty image in its place, and the attacker reads what it sends.
"""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.adapters import Dense, inject, keys, trainable
from fedlora_mini.data import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.federation import METHODS, Budget, Request, Update
from fedlora_mini.federation.aggregation import private as client_dp
from fedlora_mini.federation.aggregation.private import ClientDP
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.privacy import DPSGD, Release, dpsgd, epsilon
from fedlora_mini.privacy.audit import against_curve, lower_bound

GAMES, STEPS, IMAGES, WIDTH, LR, DELTA = 600, 4, 4, 6, 1e-6, 1e-3
MECHANISM = DPSGD(sigma=0.9, q=0.5, C=0.7)
NAME = "layer.D"


def scores(execution, mechanism=MECHANISM):
    """(GAMES,) with the canary and without: what the clients' updates say in its direction, in units of C."""
    model = nn.Sequential(OrderedDict(layer=nn.Linear(WIDTH, 2, bias=False)))
    nn.init.zeros_(model.layer.weight)
    model.regions = (("layer", "head"),)
    model = inject(model, Dense, lambda path, _: path == "layer")
    canary = torch.zeros(IMAGES, WIDTH)
    canary[0, 0], others = 1e3, torch.eye(WIDTH)[2 : IMAGES + 1]
    images = [torch.cat([canary[:1] if game % 2 else canary[1:2], others]) for game in range(2 * GAMES)]
    data = [Split(x, torch.zeros(IMAGES, dtype=torch.long)) for x in images]
    budget = Budget(STEPS, 2, LR, "sgd", augment=False)
    start = trainable(model)
    args = (model, METHODS["fedit"], keys(model, list(start)), data, budget, 0, execution)
    engine = LocalEngine(*args, guard=Guarding(mechanism))
    sent = engine.exchange({k: Request(1, start) for k in engine.clients})
    moved = torch.stack([update.state[NAME] - start[NAME] for update in sent])  # (2 GAMES, 2, WIDTH)
    assert all(m.ledger.releases == [Release(mechanism.sigma, mechanism.q, STEPS)] for m in engine.members)
    told = (moved[:, 0, 0] - moved[:, 1, 0]) / 2**0.5 / LR * mechanism.q * IMAGES / mechanism.C
    return told[1::2].numpy(), told[0::2].numpy()


def judged(members, strangers, release):
    """(the largest epsilon ruled out, whether the account's curve is refuted), thresholds set on the first halves."""
    half, found = len(members) // 2, []
    for threshold in np.quantile(strangers[:half], [0.5, 0.9, 0.98]):
        hits, alarms = (int((s[half:] > threshold).sum()) for s in (members, strangers))
        counts = (hits, half, alarms, half)
        found.append((lower_bound(*counts, DELTA, 0.98), against_curve(*counts, release, 0.98).refutes))
    return max(bound for bound, _ in found), any(refuted for _, refuted in found)


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
def test_private_training_keeps_what_its_ledgers_claim(execution):
    release = Release(MECHANISM.sigma, MECHANISM.q, STEPS)
    members, strangers = scores(execution)
    bound, refuted = judged(members, strangers, release)
    assert 0.2 < bound <= epsilon([release], DELTA) and not refuted, "the attack works, and no better than it may"
    assert strangers.std() == pytest.approx(MECHANISM.sigma * STEPS**0.5, rel=0.1)
    assert members.mean() == pytest.approx(MECHANISM.q * STEPS, rel=0.15)


@pytest.mark.parametrize("execution", [pytest.param("sequential", marks=pytest.mark.slow), "grouped"])
@pytest.mark.parametrize("broken", ["no noise", "no clipping", "all drawn", "half of the noise"])
def test_what_is_broken_in_private_training_is_caught(monkeypatch, execution, broken):
    if broken == "no noise":
        monkeypatch.setattr(dpsgd, "add_noise", lambda state, std, source: state)
    elif broken == "half of the noise":
        add = dpsgd.add_noise
        monkeypatch.setattr(dpsgd, "add_noise", lambda state, std, source: add(state, std / 2, source))
    elif broken == "no clipping":
        monkeypatch.setattr(dpsgd, "clip_sum", lambda rows, C, how: {n: g.sum(0) for n, g in rows.items()})
    else:
        monkeypatch.setattr("fedlora_mini.federation.member.poisson", lambda n, q, rng: torch.arange(n))
    assert judged(*scores(execution), Release(MECHANISM.sigma, MECHANISM.q, STEPS))[1]


def told_of_a_client(rule, games=GAMES):
    """The server's model in the direction of a client that took part, and without it: (games,) each."""
    start = {"a.A": torch.zeros(2, 3)}
    loud, others = torch.zeros(2, 3), [Update(k, {"a.A": torch.eye(2, 3) * 0.05}, 1.0) for k in range(3)]
    loud[1, 2] = 1e3
    both = []
    for more in ([Update(9, {"a.A": loud}, 1.0)], []):
        seeds = range(games * bool(more), games * bool(more) + games)
        rounds = [replace(rule, seed=seed)(start, [*others, *more])["a.A"][1, 2] for seed in seeds]
        both.append(torch.stack(rounds).double().numpy() * rule.clients / rule.C)
    return both


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_a_round_that_protects_clients_keeps_its_claim_and_is_caught_without_its_noise(monkeypatch, quantile):
    """The model alone: with a quantile its noise is larger, since the count is told too."""
    rule = ClientDP(sigma=0.7, clients=10.0, C=0.1, quantile=quantile)
    claim = Release(rule.sum_sigma, 1.0)
    bound, refuted = judged(*told_of_a_client(rule), claim)
    assert 0.2 < bound <= epsilon([claim], DELTA) and not refuted
    add = client_dp.add_noise
    for share in (0.0, 0.5):
        monkeypatch.setattr(client_dp, "add_noise", lambda state, std, source, s=share: add(state, s * std, source))
        assert judged(*told_of_a_client(rule), claim)[1], share
