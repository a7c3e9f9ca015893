"""Every row, on a network with batch norms: whose are the running statistics, after a round and in the next?"""

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.features import statistic
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.aggregation import uniform, weighted
from fedlora_mini.federation.aggregation.messages import WEIGHT
from fedlora_mini.models import build
from watched import advance, federation, parts

FULL = [name for name, row in METHODS.items() if row.adapter == "full"]
ADAPTED = [name for name in METHODS if name not in FULL]
KEPT = {"fedbn": "norm", "fedrep": "head", "fedas": "head", "fedproto": "all"}  # at other rows all statistics travel
PERSONAL = ("ditto", "iop")  # rows with a second model, which stays
WEIGHTS = {uniform: lambda update: 1.0, weighted: lambda update: float(update.state[WEIGHT])}  # else, the images


def unet_bn(classes):
    return build("unet_bn", classes, features=(4, 8, 8))


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ADAPTED)
def test_under_adapters_statistics_stay_as_they_are(tiny, name):
    options = {"sites": 3} if METHODS[name].adapter == "lcfed" else {}
    watched, server = federation(name, parts(tiny), network=unet_bn, **options)
    model = watched.setting.model
    before = S.clone(dict(model.named_buffers()))
    assert any(map(statistic, before)) and not any(map(statistic, watched.setting.keys))
    advance(watched, server, 2)
    assert equal(dict(model.named_buffers()), before)


@pytest.mark.parametrize("name", FULL)
def test_statistics_are_combined_or_kept_like_the_weights_beside_them(tiny, name):
    watched, server = federation(name, parts(tiny), network=unet_bn)
    row, keys, clients = watched.setting.method, watched.setting.keys, watched.clients
    start = S.pick(server.state, statistic)
    kept = {n for n in start if KEPT.get(name) in ("all", keys[n].kind, keys[n].region)}
    shared = start.keys() - kept
    advance(watched, server, 1)
    sent, ends = watched.updates[0], [S.pick(watched.ends(1)[k], statistic) for k in clients]
    assert all({n for n in update.state if statistic(n)} == shared for update in sent)
    mean = S.mean(ends, [WEIGHTS.get(row.rule, lambda update: update.weight)(update) for update in sent])
    after = S.pick(server.state, statistic)
    for n in shared:
        torch.testing.assert_close(after[n], mean[n], rtol=1e-6, atol=1e-7)
    for k, end in zip(clients, ends, strict=True):
        own = S.pick(watched.engine.personal(k, server), statistic)
        last = next(each for client, _, _, each in reversed(watched.fits) if client == k)
        mine = start.keys() if name in PERSONAL else kept
        assert not any(torch.equal(end[n], start[n]) for n in start)
        assert equal(own, after | S.pick(last, mine.__contains__))
        assert not any(torch.equal(own[n], state[n]) for n in mine for state in (start, server.state))
        ends[k] = after | S.pick(end, kept.__contains__)
    advance(watched, server, 2)
    assert all(equal(S.pick(watched.starts(2)[k], statistic), ends[k]) for k in clients)
