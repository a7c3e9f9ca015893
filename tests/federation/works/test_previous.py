"""MOON by hand: the last model as a memory that training must not write into."""

import torch

from fedlora_mini import state as S
from fedlora_mini.federation import METHODS, Method, Request
from fedlora_mini.federation.sharing import everything
from fedlora_mini.federation.works import Remember
from watched import Normed, advance, federation, parts, run


def test_moon_begins_as_fedavg_and_remembers_its_last_model(tiny):
    watched, server = federation("moon", parts(tiny))
    plain, mean = federation("fedavg", parts(tiny))
    advance(watched, server, 1), advance(plain, mean, 1)
    assert S.digest(server.state) == S.digest(mean.state)
    for member in watched.members:
        assert S.digest(member.recall("~previous/")) == S.digest(watched.ends(1)[member.number])
    advance(watched, server, 2), advance(plain, mean, 2)
    assert S.digest(server.state) != S.digest(mean.state)
    assert not any("~" in name for updates in watched.updates for u in updates for name in u.state)


def test_memory_alone_changes_nothing(tiny):
    ends = [
        run(Method("", "full", everything, work=work), parts(tiny), 2)[1]
        for work in (Remember(), METHODS["fedavg"].work)
    ]
    assert S.digest(ends[0].state) == S.digest(ends[1].state)


def test_a_look_at_other_models_writes_no_statistics(tiny):
    """MOON runs what the server sent and what the client remembers: training must not write into either."""
    watched, server, _ = run("moon", parts(tiny), 1, network=Normed)
    sent, last = S.clone(server.state), watched.ends(1)
    member = watched.members[0]
    member.receive(Request(2, server.state))
    end, _ = member.fit(2)
    assert S.digest(server.state) == S.digest(sent) == S.digest(member.tensors)
    assert S.digest(member.recall("~previous/")) == S.digest(last[0])
    assert not torch.equal(end["encoder.1.running_mean"], sent["encoder.1.running_mean"])
