"""FedALT by hand: the others' mean beside an own pair."""

from dataclasses import replace

import torch

from fedlora_mini import state as S
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.works import OwnPair
from watched import advance, federation, parts, run

FEDALT = replace(METHODS["fedalt"], work=OwnPair())


def pairs(state):
    return {name: value for name, value in state.items() if name.endswith((".A", ".B"))}


def test_a_client_is_told_the_others_mean_and_goes_on_from_its_own_pair(tiny):
    """Weighted by images, over the pairs that the others last sent: in round 3 client 2's is one round old."""
    watched, server = federation(FEDALT, parts(tiny))
    present = {1: [0, 1, 2], 2: [0, 1], 3: [0, 1, 2]}
    start, last, weights = S.clone(server.state), {}, {0: 8, 1: 4, 2: 6}
    for round in (1, 2, 3):
        advance(watched, server, round, present.__getitem__)
        for client in present[round]:
            news, begin = watched.requests[-1][client].state, watched.starts(round)[client]
            assert not pairs(news)
            assert S.digest(pairs(begin)) == S.digest(last.get(client, pairs(start)))
            others = [k for k in last if k != client]
            for name in pairs(start):
                expected = sum(weights[k] * last[k][name] for k in others) / max(1, sum(weights[k] for k in others))
                rest = f"{name}_rest"
                assert (rest in news) == bool(others)
                if others:
                    torch.testing.assert_close(news[rest], expected)
                    assert torch.equal(begin[rest], news[rest])
                else:
                    assert not begin[rest].any()
        for update in watched.updates[-1]:
            last[update.client] = pairs(watched.ends(round)[update.client])
            assert S.digest(pairs(update.state)) == S.digest(last[update.client])
            assert not any(name.endswith(("_rest", "router")) for name in update.state)
    for client in watched.clients:
        own = watched.engine.personal(client, server)
        assert S.digest(pairs(own)) == S.digest(last[client])
        assert all(torch.equal(own[n], v) for n, v in watched.requests[-1][client].state.items() if n.endswith("_rest"))


def test_heads_are_averaged_as_usual_and_the_desk_never_travels(tiny):
    watched, server, records = run(FEDALT, parts(tiny), 2)
    for name in ("head.D", "head.d"):
        mean = sum(u.weight * u.state[name] for u in watched.updates[1]) / 18
        torch.testing.assert_close(server.state[name], mean)
    assert not any(name.startswith("~") for request in watched.requests[1].values() for name in request.state)
    sent = 4 * sum(value.numel() for value in watched.updates[1][0].state.values())
    assert records[1].bytes_down == records[1].bytes_up == 3 * sent
