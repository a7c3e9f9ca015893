"""HarmoFL's and FedDG's styles by hand."""

import numpy as np
import torch

from fedlora_mini.federation.works import Style
from watched import BUDGET, advance, federation, half, parts


def test_harmofl_trains_and_tests_on_one_amplitude(tiny):
    """The clients' mean, each counting the same; what the network is given in training is what `images` makes."""
    watched, server = federation("harmofl", parts(tiny))
    seen = []
    watched.setting.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    advance(watched, server, 1)
    x, _ = watched.members[0].batches(1, BUDGET)(1)
    assert torch.equal(seen[0], x)  # the first round is on the images as they are
    means = [np.abs(np.fft.fft2(m.data.images.double().numpy())).mean(0) for m in watched.members]
    torch.testing.assert_close(
        server.state["~amplitude"].double(), torch.from_numpy(sum(means) / 3), rtol=1e-5, atol=1e-4
    )
    del seen[:]
    advance(watched, server, 2)
    for k, member in enumerate(watched.members):
        batches = member.batches(2, BUDGET)
        for step in (1, 2):
            x, _ = batches(step)
            given = watched.setting.method.images(x, member.notes)
            first, second = seen[4 * k + 2 * step - 2 : 4 * k + 2 * step]  # at w and above it
            assert torch.equal(first, given) and torch.equal(second, given)
            assert not torch.allclose(given, x, atol=1e-3)
    x = half(tiny.sites[0].test)[0]
    shown = [watched.setting.method.images(x, notes) for notes in (watched.members[0].notes, server.state)]
    torch.testing.assert_close(*shown)


def test_episodes_are_in_the_others_styles(tiny):
    """A client's own amplitude comes back from the server and is put aside."""
    watched, server = federation("feddg", parts(tiny))
    seen = []
    for member in watched.members:
        fit = member.fit
        member.fit = lambda *a, m=member, f=fit, **k: (
            seen.append((m.number, set(m.recall("~bank/style/")))),
            f(*a, **k),
        )[1]
    advance(watched, server, 3)
    assert seen[:3] == [(0, set()), (1, set()), (2, set())]
    assert seen[3:] == 2 * [(0, {"1", "2"}), (1, {"0", "2"}), (2, {"0", "1"})]
    for k, member in enumerate(watched.members):
        whole = torch.from_numpy(np.abs(np.fft.fft2(member.data.images.double().numpy())).mean(0)).float()
        torch.testing.assert_close(member.memory["~style"], whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(server.state[f"~bank/style/{k}"], member.memory["~style"])


def test_the_mean_of_styles_leaves_no_note_and_the_bank_one():
    assert Style().notes == () and Style().messages == ("~amplitude",)
    assert Style(bank=True).notes == ("~style",) and Style(bank=True).messages == ("~bank/style",)
