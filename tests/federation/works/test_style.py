"""HarmoFL's and FedDG's styles by hand."""

import numpy as np
import torch

from fedlora_mini.data.spectral import low_frequency_window
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.works import Style
from watched import BUDGET, advance, federation, half, parts, run


def low(images, ratio=0.05):
    """By numpy: the mean amplitude, zero outside the window."""
    amplitude = np.abs(np.fft.fft2(images.double().numpy())).mean(0)
    return amplitude * low_frequency_window(*amplitude.shape[-2:], ratio).numpy()


def test_harmofl_trains_and_tests_on_one_amplitude(tiny):
    """The clients' mean, each counting the same; what the network is given in training is what `images` makes."""
    watched, server = federation("harmofl", parts(tiny))
    seen = []
    watched.setting.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    advance(watched, server, 1)
    x, _ = watched.members[0].batches(1, BUDGET)(1)
    assert torch.equal(seen[0], x)  # the first round is on the images as they are
    means = [low(m.data.images) for m in watched.members]
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
        style = torch.from_numpy(low(member.data.images)).float()
        torch.testing.assert_close(member.memory["~style"], style, rtol=1e-4, atol=1e-4)
        assert torch.equal(server.state[f"~bank/style/{k}"], member.memory["~style"])


def test_the_mean_of_styles_leaves_no_note_and_the_bank_one():
    assert Style().notes == () and Style().messages == ("~amplitude",)
    assert Style(bank=True).notes == ("~style",) and Style(bank=True).messages == ("~bank/style",)


def test_a_client_tells_the_window_that_others_read_and_no_more(tiny):
    """One setting for both: what is told outside the window nobody reads."""
    for name in ("harmofl", "feddg"):
        row = METHODS[name].but(ratio=0.2)
        assert row.work.ratio == 0.2 == next(part.ratio for part in row.objective if hasattr(part, "ratio"))
        watched, _, _ = run(row, parts(tiny), 1)
        told = next(v for n, v in watched.updates[0][0].state.items() if n.startswith("~"))
        window = low_frequency_window(*told.shape[-2:], 0.2).bool().expand_as(told)
        assert told[window].all() and not told[~window].any()
