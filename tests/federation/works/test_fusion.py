"""FDLoRA by hand: the search for a fusion."""

from dataclasses import replace

import pytest

from fedlora_mini import state as S
from fedlora_mini.adapters import call
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.works import Fusion
from fedlora_mini.losses import segmentation_loss
from watched import BUDGET, advance, close, federation, parts


def judged(watched, client, state, images):
    data = watched.members[client].data
    return float(
        segmentation_loss(call(watched.setting.model, state, data.images[:images]), data.masks[:images]).mean()
    )


def test_a_fusion_never_makes_it_worse_on_the_images_that_judge(tiny):
    """Than the numbers that the round was trained with; one pair for all layers, which stays at the client."""
    work = Fusion(trials=6, images=4)
    watched, server = federation(replace(METHODS["fdlora"], work=work), parts(tiny), budget=replace(BUDGET, lr=5e-2))
    better = 0
    for round in (1, 2, 3):
        advance(watched, server, round)
        for client, end in watched.ends(round).items():
            own = watched.members[client].memory
            mixes = {name: own[name] for name in end if name.endswith(".mix")}
            assert len({tuple(value.tolist()) for value in mixes.values()}) == 1
            before, after = judged(watched, client, end, 4), judged(watched, client, end | mixes, 4)
            assert after <= before
            better += after < before
            assert close(S.pick(watched.engine.personal(client, server), mixes.__contains__), mixes, 1e-12)
    assert better > 0
    assert not any(n.endswith((".mix", "_own")) for updates in watched.updates for u in updates for n in u.state)


def test_a_search_goes_on_from_where_it_was(tiny):
    watched, server = federation(replace(METHODS["fdlora"], work=Fusion(trials=8, width=1.0)), parts(tiny))
    advance(watched, server, 1)
    found = [S.pick(m.memory, lambda n: n.endswith(".mix")) for m in watched.members]
    assert any(float((next(iter(m.values())) - 1).abs().max()) > 0 for m in found)
    watched.setting.method = replace(METHODS["fdlora"], work=Fusion(trials=1))
    advance(watched, server, 2)
    assert S.digest(found) == S.digest([S.pick(m.memory, lambda n: n.endswith(".mix")) for m in watched.members])


def test_a_fusion_needs_branches_with_numbers(tiny):
    watched, server = federation(replace(METHODS["fedit"], work=Fusion()), parts(tiny))
    with pytest.raises(FedloraError, match="factors 'mix'"):
        advance(watched, server, 1)
