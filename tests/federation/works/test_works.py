"""What all works promise: words for the table, and good notes kept when a client diverges."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.row import Work
from watched import advance, parts, run


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if type(row.work) is not Work])
def test_every_work_has_words_for_the_table(name):
    work = METHODS[name].work
    assert 0 < len(work.label) < 80
    assert all(isinstance(name, str) and "~" in name for name in (*work.messages, *work.notes))


@pytest.mark.parametrize("name", ["ditto", "iop", "moon", "fedas", "resfim"])
def test_a_client_that_diverges_keeps_its_last_good_notes(tiny, name):
    watched, server, _ = run(name, parts(tiny), 2)
    member = watched.members[1]
    good, notes = member.data, S.clone(S.pick(member.notes, lambda name: not name.startswith("~bank")))
    member.data = Split(torch.full_like(good.images, float("nan")), good.masks)
    [record] = advance(watched, server, 3)
    assert len(record.refused) == 1 and "client 1" in record.refused[0]
    assert S.digest(S.pick(member.notes, notes.__contains__)) == S.digest(notes)
    member.data = good
    [record] = advance(watched, server, 4)
    assert not record.refused and S.finite(watched.engine.personal(1, server))


@pytest.mark.parametrize("returned", [({}, 0.0), ({}, None, {}), ({}, 0.0, None), {}, None], ids=str)
def test_a_round_that_returns_something_else_is_named(tiny, returned):
    class Mine(Work):
        def round(self, client, round):
            return returned

    row = replace(METHODS["fedit"], work=Mine())
    with pytest.raises(FedloraError, match=r"work 'Mine' returned .* from its round; .* a tuple of three"):
        run(row, parts(tiny), 1)
