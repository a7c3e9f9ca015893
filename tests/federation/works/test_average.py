"""IOP-FL by hand: the moving average, and what a newcomer mixes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import call
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.works import MovingAverage
from fedlora_mini.federation.works.average import spread as spread_of
from fedlora_mini.federation.works.average import unlabelled
from watched import Normed, advance, close, federation, half, parts, run


def test_the_moving_average_by_hand_beside_fedavg(tiny):
    watched, server = federation(replace(METHODS["iop"], work=MovingAverage(keep=0.3)), parts(tiny))
    plain, mean = federation("fedavg", parts(tiny))
    u = {}
    for round in (1, 2, 3):
        advance(watched, server, round), advance(plain, mean, round)
        for client, w in watched.ends(round).items():
            u[client] = S.add(S.scale(u[client], 0.3), w, 0.7) if round > 1 else w
            assert close(watched.engine.personal(client, server), u[client], 1e-6)
    assert S.digest(S.pick(server.state, is_model)) == S.digest(mean.state)


def test_an_average_that_keeps_nothing_is_the_trained_model(tiny):
    watched, server, _ = run(replace(METHODS["iop"], work=MovingAverage(keep=0.0)), parts(tiny), 3)
    for client, w in watched.ends(3).items():
        assert all(torch.equal(value, w[n]) for n, value in watched.engine.personal(client, server).items())


def shares(state, experts, path):
    """π of a layer of the mixture, by least squares over its entries, and how well it fits."""
    names = [name for name in state if name.rpartition(".")[0] == path]
    U = torch.stack([torch.cat([u[n].flatten() for n in names]) for u in experts]).double()
    w = torch.cat([state[n].flatten() for n in names]).double()
    pi = torch.linalg.lstsq(U.T, w).solution
    return pi, float((pi @ U - w).norm() / w.norm())


@pytest.mark.parametrize("network", [None, Normed], ids=["minisam", "batch norm"])
def test_a_newcomers_layers_are_mixtures_and_surer_of_its_images(tiny, network):
    row = replace(METHODS["iop"], work=MovingAverage(passes=10))
    watched, server, _ = run(row, parts(tiny), 2, network=network)
    images, model, common = half(tiny.unseen[0].test)[0], watched.setting.model, watched.engine.common(server)
    averages = [member.recall("~average/") for member in watched.members]
    experts, before = [*averages, common], S.digest(averages)
    state = row.work.newcomer(common, watched.members, images)
    heads = ["encoder.0", "head"] if network else ["encoder.patch", "encoder.blocks.0.up"]
    found = []
    for path in (path for path, module in model.named_modules() if path in heads):
        pi, misfit = shares(state, experts, path)
        assert misfit < 1e-4 and float(pi.min()) >= -1e-6 and float(pi.sum()) == pytest.approx(1.0, abs=1e-4)
        found.append(pi)
    assert found and max(float(pi.max() - pi.min()) for pi in found) > 0.05
    assert len(found) == 2 and (found[0] - found[1]).abs().max() > 1e-3, "every layer has its own"
    model.eval()
    values = [float(unlabelled(model, s, images)) for s in (S.mean(experts, [1.0] * 4), state)]
    assert values[1] < values[0]
    assert S.digest(averages) == before and not any(value.requires_grad for value in state.values())


def test_a_newcomers_shares_and_norms_are_adams_on_the_model_as_it_is_used(tiny):
    """With a batch norm: by the common model's statistics, not by those of the newcomer's batch."""
    row = replace(METHODS["iop"], work=MovingAverage(passes=4, rate=0.2, norm_rate=0.05, images=3))
    watched, server, _ = run(row, parts(tiny), 2, network=Normed)
    model, x = watched.setting.model, half(tiny.unseen[0].test)[0]
    common = watched.engine.common(server)
    experts = [*(member.recall("~average/") for member in watched.members), common]
    scales = [name for name in common if name in ("encoder.1.weight", "encoder.1.bias")]
    assert len(scales) == 2

    def mixed(leaves):
        out = dict(common) | {name: leaves[name] for name in scales}
        for path in ("encoder.0", "head"):
            pi = leaves[path].softmax(0)
            out |= {
                f"{path}.{f}": sum(p * u[f"{path}.{f}"] for p, u in zip(pi, experts, strict=True))
                for f in ("weight", "bias")
            }
        return out

    own = {path: torch.zeros(4) for path in ("encoder.0", "head")} | {name: common[name].clone() for name in scales}
    rate = dict.fromkeys(("encoder.0", "head"), 0.2) | dict.fromkeys(scales, 0.05)
    m, v = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0.0)
    model.eval()
    for t in range(1, 5):
        leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
        gradients = torch.autograd.grad(unlabelled(model, mixed(leaves), x[:3]), list(leaves.values()))
        for (name, value), g in zip(own.items(), gradients, strict=True):
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
            own[name] = value - rate[name] * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    model.train()
    state = row.work.newcomer(common, watched.members, x)
    assert close(state, mixed(own), 1e-4) and model.training
    assert all(torch.equal(state[name], common[name]) for name in common if "running" in name)
    assert not close(S.pick(state, scales.__contains__), S.pick(common, scales.__contains__), 1e-3)


def test_what_a_newcomer_minimises(tiny):
    watched, server, _ = run("iop", parts(tiny), 1)
    x = half(tiny.unseen[0].test)[0]
    state, model = watched.engine.common(server), watched.setting.model
    p, q = (call(model, state, images).softmax(1).double().numpy() for images in (x, x.flip(3)))
    entropy = -(p * np.log(p)).sum(1).mean()
    change = ((p - q[..., ::-1]) ** 2).sum(1).mean()
    spread = np.zeros_like(p[:, 1:])
    for i, j in np.ndindex(*p.shape[2:]):
        around = p[:, 1:, max(0, i - 10) : i + 11, max(0, j - 10) : j + 11]
        spread[:, :, i, j] = around.max((2, 3)) - around.min((2, 3))
    shape = np.sqrt((spread**2).sum())
    expected = 10 * entropy / np.log(p.shape[1]) + 0.1 * change + 1e-6 * shape
    assert float(unlabelled(model, state, x)) == pytest.approx(expected, rel=1e-4)
    assert float(spread_of(torch.from_numpy(p[:, 1:])).norm()) == pytest.approx(shape, rel=1e-6) and shape > 0


def test_a_newcomer_mixes_those_who_have_trained(tiny):
    watched, server = federation("iop", parts(tiny))
    work, images = watched.setting.method.work, half(tiny.unseen[0].test)[0]
    assert work.newcomer(server.state, watched.members, images) is server.state
    advance(watched, server, 1, lambda round: [1])
    state, only = work.newcomer(server.state, watched.members, images), watched.members[1].recall("~average/")
    off = {name: float((state[name] - value).abs().max()) for name, value in only.items()}
    norms = {name for name in off if "norm" in name}
    assert norms and max(off[name] for name in off.keys() - norms) < 1e-6 < max(off[name] for name in norms) < 0.02
