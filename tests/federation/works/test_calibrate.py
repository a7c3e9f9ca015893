"""LC-Fed by hand: heads that see each other, logits corrected where they disagree."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini.adapters.features import embed
from fedlora_mini.errors import FedloraError
from watched import BUDGET, advance, federation, half, parts


def test_lcfeds_clients_see_each_others_heads_and_their_own_site(tiny):
    watched, server = federation("lcfed", parts(tiny), sites=3)
    present = {1: [0, 1, 2], 2: [0, 2], 3: [0, 1, 2]}
    last = {k: {"head.D": 0.0, "head.d": 0.0} for k in range(3)}
    for round in (1, 2, 3):
        advance(watched, server, round, present.__getitem__)
        for client in present[round]:
            begin = watched.starts(round)[client]
            sites = [value.tolist() for name, value in begin.items() if name.endswith(".site")]
            assert sites and all(value == [float(k == client) for k in range(3)] for value in sites)
            for name in ("head.D", "head.d"):
                for k in range(3):
                    expected = torch.as_tensor(last[k][name]).expand_as(begin[name])
                    assert torch.equal(begin[f"{name}_rest"][k], expected)
        for update in watched.updates[-1]:
            end = watched.ends(round)[update.client]
            assert not any(name.startswith("head") or name.endswith(".site") for name in update.state)
            last[update.client] = {name: end[name] for name in ("head.D", "head.d")}
            for name, value in last[update.client].items():
                assert torch.equal(update.state[f"~bank/head/{name}"], value)
    assert not torch.equal(last[0]["head.D"], last[1]["head.D"])
    own = watched.engine.personal(0, server)
    assert torch.equal(own["head.D"], last[0]["head.D"])


def test_where_heads_disagree_the_logits_are_corrected(tiny):
    """z + W_own [z; u], u the variance of the heads' predictions: zero as long as all heads are the base's."""
    watched, server = federation("lcfed", parts(tiny), budget=replace(BUDGET, steps=4, lr=5e-2), sites=3)
    advance(watched, server, 2)
    model, state, x = watched.setting.model, watched.ends(2)[1], half(tiny.sites[1].test)[0]
    logits, f = embed(model, state, x)
    W, b = (model.head.base.weight, model.head.base.bias)
    heads = [
        torch.nn.functional.conv2d(f, W + D, b + d)
        for D, d in zip(state["head.D_rest"], state["head.d_rest"], strict=True)
    ]
    u = torch.stack([z.softmax(1) for z in heads]).var(0, correction=0)
    z = torch.nn.functional.conv2d(f, W + state["head.D"], b + state["head.d"])
    expected = z + torch.einsum("ij,njhw->nihw", state["head.W_own"], torch.cat([z, u], 1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert u.max() > 1e-6 and state["head.W_own"].any()


def test_a_client_that_the_adapter_has_no_place_for_is_named(tiny):
    watched, server = federation("lcfed", parts(tiny), sites=2)
    with pytest.raises(FedloraError, match="tells 2 sites apart, there is a client 2"):
        advance(watched, server, 1)
