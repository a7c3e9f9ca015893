"""FedProto by hand: means over voxels are all that travels."""

import torch

from fedlora_mini import state as S
from fedlora_mini.data import IGNORE
from fedlora_mini.federation.works.prototypes import prototypes
from watched import Normed, class_means, parts, run


def test_only_prototypes_travel_and_they_are_means_over_voxels(tiny):
    splits = parts(tiny)
    splits[1].masks[splits[1].masks == 2] = 0  # client 1 has no kidneys
    for split in splits:
        split.masks[split.masks == 5] = IGNORE  # and lesions are judged by nobody
    watched, server, records = run("fedproto", splits, 2)
    expected, counts = torch.zeros(6, 4), torch.zeros(6)
    for update in watched.updates[1]:
        assert update.state.keys() == {"~prototype", "~count"}
        end = watched.ends(2)[update.client]
        means, n = class_means(watched.setting.model, end, splits[update.client], 6)
        torch.testing.assert_close(update.state["~prototype"], means, rtol=1e-4, atol=1e-5)
        assert torch.equal(update.state["~count"], n)
        expected, counts = expected + means * n[:, None], counts + n
    found = server.state["~prototype"]
    torch.testing.assert_close(found[:5], (expected / counts[:, None])[:5], rtol=1e-4, atol=1e-5)
    assert not found[5].any() and server.state["~count"].tolist() == counts.tolist()
    without = [u.state["~prototype"][2] for u in watched.updates[1]]
    assert not without[1].any() and found[2].norm() > 0.9 * min(without[0].norm(), without[2].norm())
    assert records[0].bytes_up == records[1].bytes_up == 3 * 4 * (6 * 4 + 6)
    assert [record.bytes_down for record in records] == [0, 3 * 4 * (6 * 4 + 6)]


def test_prototypes_do_not_depend_on_the_batch_and_leave_norms_statistics_alone(tiny):
    watched, _, _ = run("fedavg", parts(tiny), 1, network=Normed)
    member, end = watched.members[0], watched.ends(1)[0]
    before = S.digest(end)
    whole, one = prototypes(member, end), prototypes(member, end, batch=3)
    torch.testing.assert_close(whole, one, rtol=1e-4, atol=1e-6)
    assert S.digest(end) == before and watched.setting.model.training
