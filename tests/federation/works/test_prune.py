"""HetLoRA by hand: rank pruned where the tail shrank."""

import math
from dataclasses import replace

import torch

from fedlora_mini import state as S
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.works import SelfPruning
from watched import SGD, advance, close, federation, gradient, parts


def beyond(state, rank):
    """Σ over layers of ||B[:, rank:]|| ||A[rank:]||."""
    paths = {n[:-2] for n in state if n.endswith(".A")}
    return sum(float(state[f"{p}.B"][:, rank:].norm() * state[f"{p}.A"][rank:].norm()) for p in paths)


def rows(state):
    return {len(value) for name, value in state.items() if name.endswith(".A")}


def test_hetlora_prunes_where_the_tail_shrank_and_the_server_sends_fewer_rows(tiny):
    watched, server = federation(
        replace(METHODS["hetlora"], work=SelfPruning(0.75, lam=0.1)), parts(tiny), ranks={1: 2}, rank=4
    )
    ranks, pruned = {0: 4, 1: 2, 2: 4}, 0
    for round in range(1, 5):
        [record] = advance(watched, server, round)
        told = watched.requests[-1]
        for client, request in told.items():
            assert rows(request.state) == ({ranks[client]} if round > 1 else set())
        assert record.bytes_down == sum(S.nbytes(request.state) for request in told.values())
        for update in watched.updates[-1]:
            start, end = watched.starts(round)[update.client], watched.ends(round)[update.client]
            r = ranks[update.client]
            smaller = max(1, math.floor(0.75 * r))
            shrank = beyond(end, smaller) < beyond(start, smaller)
            pruned += shrank
            ranks[update.client] = smaller if shrank else r
            assert rows(start) == {r} and rows(update.state) == {ranks[update.client]}
            for name, value in update.state.items():
                cut = end[name][: len(value)] if name.endswith(".A") else end[name]
                assert torch.equal(value, cut[:, : value.shape[1]] if name.endswith(".B") else cut)
        assert server.ranks == ranks
        assert rows(server.state) == {4}
        if round == 1:
            assert not pruned  # B began as zero: no tail can have shrunk
    assert ranks == {0: 2, 1: 1, 2: 2} and pruned == 5


def test_the_tails_penalty_is_in_the_step(tiny):
    """lam ||B[:, r':]|| ||A[r':]|| summed over layers, r' = floor(gamma r): a step of SGD by hand."""
    budget = replace(SGD, steps=1)
    row = replace(METHODS["hetlora"], work=SelfPruning(0.5, lam=0.3))
    watched, server = federation(row, parts(tiny), budget=budget, rank=4)
    advance(watched, server, 2)
    start, end = watched.starts(2)[0], watched.ends(2)[0]

    def tail(leaves):
        paths = [n[:-2] for n in leaves if n.endswith(".A")]
        return 0.3 * sum(leaves[f"{p}.B"][:, 2:].norm() * leaves[f"{p}.A"][2:].norm() for p in paths)

    g = gradient(watched.setting.model, start, *watched.members[0].batches(2, budget)(1), tail)
    assert close(S.sub(start, end), S.scale(g, SGD.lr), 1e-4)
