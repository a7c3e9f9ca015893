"""What clients do beside training: each work against its formulas by hand, on what really travels and stays."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.adapters.features import embed
from fedlora_mini.data import IGNORE, Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Budget, Method, Request, Server, federate
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.sharing import all_but_head, everything, nothing
from fedlora_mini.federation.works import (
    Calibrated,
    Ditto,
    FedAS,
    Fusion,
    MovingAverage,
    OwnPair,
    Remember,
    ResFIM,
    SelfPruning,
    Style,
)
from fedlora_mini.federation.works.align import ToMine
from fedlora_mini.federation.works.average import spread as spread_of
from fedlora_mini.federation.works.average import unlabelled
from fedlora_mini.federation.works.prototypes import prototypes
from fedlora_mini.federation.works.residual import SCORES, directions, residual, sensitive
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build

BUDGET = Budget(steps=2, batch=2, lr=1e-2)
SGD = replace(BUDGET, optimiser="sgd", lr=0.1)


class Watched:
    """An engine that writes down what passes, and every local training: (client, round, start, end, budget steps)."""

    def __init__(self, engine):
        self.engine, self.clients, self.setting = engine, engine.clients, engine.setting
        self.members, self.requests, self.updates, self.fits = engine.members, [], [], []
        for member in self.members:
            member.fit = self.spy(member, member.fit)

    def spy(self, member, fit):
        def fitted(round, start=None, *args, **kwargs):
            begin = S.clone(member.tensors if start is None else start)
            end, loss = fit(round, start, *args, **kwargs)
            self.fits.append((member.number, round, begin, S.clone(end)))
            return end, loss

        return fitted

    def exchange(self, requests):
        self.requests.append(requests)
        self.updates.append([])
        for update in self.engine.exchange(requests):
            self.updates[-1].append(update)
            yield update

    def ends(self, round):
        """What training gave in a round, by client: the first fit of each."""
        return {client: end for client, t, _, end in reversed(self.fits) if t == round}

    def starts(self, round):
        return {client: begin for client, t, begin, _ in reversed(self.fits) if t == round}


class Normed(nn.Module):
    """A small network with a batch norm."""

    def __init__(self, classes):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def parts(data, sizes=(8, 4, 6)):
    """Sites of unequal size, at half the resolution."""
    return [Split(*half(s.train, n)) for s, n in zip(data.sites, sizes, strict=True)]


def half(split, n=None):
    return split.images[:n, :, ::2, ::2].contiguous(), split.masks[:n, ::2, ::2].contiguous()


def federation(row, splits, classes=6, budget=BUDGET, ranks=None, network=None, **options):
    row = METHODS[row] if isinstance(row, str) else row
    plain = build("minisam", classes, d=16, depth=1, stem=4, width=4) if network is None else network(classes)
    model = prepare(plain, row.adapter, **options)
    start = trainable(model)
    engine = LocalEngine(model, row, keys(model, list(start)), splits, budget, 0, "sequential", ranks=ranks)
    return Watched(engine), Server(S.clone(start), ranks=dict(ranks or {}))


def advance(watched, server, rounds, choose=None):
    """Up to so many rounds."""
    setting, everyone = watched.setting, choose or (lambda round: watched.clients)
    args = (setting.method, watched, server, setting.keys, rounds, setting.budget.steps, everyone)
    return list(federate(*args, layers=setting.layers))


def run(row, splits, rounds, **options):
    watched, server = federation(row, splits, **options)
    return watched, server, advance(watched, server, rounds)


def models(watched, server):
    """The server's model and every client's own."""
    return [S.pick(server.state, is_model), *(watched.engine.personal(k, server) for k in watched.clients)]


def gradient(model, state, x, y, extra=lambda leaves: 0.0):
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    value = segmentation_loss(call(model, leaves, x), y).mean() + extra(leaves)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def close(a, b, tolerance=1e-5):
    return S.norm(S.sub(a, b)) < tolerance * S.norm(b)


# ---------------------------------------------------------------- pFL-ResFIM


def resfim(adapter="full", shared=everything, **options):
    """Judged by the first three images, to be quick."""
    return replace(METHODS["resfim"], adapter=adapter, shared=shared, work=ResFIM(**{"images": 3} | options))


def first(split, n=3):
    return Split(split.images[:n], split.masks[:n])


def kept(update):
    """Which entries a client kept, by tensor."""
    return {n.removesuffix("~mask"): v == 0 for n, v in update.state.items() if n.endswith("~mask")}


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_resfim_that_keeps_nothing_is_fedavg_to_the_bit(tiny, adapter):
    ends = []
    for row in (resfim(adapter, tau=0.0, warmup=0), replace(METHODS["fedavg"], adapter=adapter)):
        watched, server, _ = run(row, parts(tiny), 2)
        ends.append(S.digest(models(watched, server)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_resfim_that_keeps_everything_sends_masks_alone_and_is_local_training(tiny, adapter):
    row = resfim(adapter, tau=1.0, score="information", warmup=0)
    watched, server, records = run(row, parts(tiny), 2)
    alone, still, _ = run(Method("local", adapter, nothing), parts(tiny), 2)
    assert S.digest(models(watched, server)) == S.digest(models(alone, still))
    bits = sum(math.ceil(value.numel() / 8) for value in models(alone, still)[0].values())
    assert records[1].bytes_up == 3 * bits
    assert not any(
        v.any() for updates in watched.updates for u in updates for n, v in u.state.items() if "style" not in n
    )


def test_the_warm_up_of_resfim_is_fedavg(tiny):
    watched, server = federation(resfim(tau=0.3, warmup=2), parts(tiny))
    plain, mean = federation("fedavg", parts(tiny))
    for round in (1, 2, 3):
        records = [advance(watched, server, round)[0], advance(plain, mean, round)[0]]
        same = S.digest(models(watched, server)) == S.digest(models(plain, mean))
        assert same == (round < 3)
    assert records[0].bytes_up < records[1].bytes_up  # three tenths less, an eighth of a quarter more


@pytest.mark.parametrize("score", SCORES)
def test_every_tensor_keeps_its_share_and_what_is_kept_is_not_sent(tiny, score):
    watched, _, records = run(resfim(tau=0.2, score=score), parts(tiny), 3)
    for t in (2, 3):
        ends, size = watched.ends(t), 0
        for update in watched.updates[t - 1]:
            masks = kept(update)
            assert masks.keys() == S.pick(update.state, is_model).keys()
            for name, mask in masks.items():
                n = mask.numel()
                assert int(mask.sum()) == round(0.2 * n)
                assert not update.state[name][mask].any()
                assert torch.equal(update.state[name][~mask], ends[update.client][name][~mask])
                size += 4 * (n - int(mask.sum())) + math.ceil(n / 8)
        assert records[t - 1].bytes_up == size


def test_of_equal_scores_no_more_are_kept_than_asked():
    """Where nothing is known of a tensor, all its scores are zero."""
    assert sensitive(torch.zeros(3, 5), 0.2).sum() == 3
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 0.0, 4.0]])
    assert sensitive(scores, 0.5).tolist() == [[True, False, False], [True, False, True]]


def test_a_round_of_resfim_by_hand(tiny):
    """θ̄_i = Σ p M θ / Σ p M, the old value where nobody sends; θ_k <- M θ̄ + (1 - M) θ_k: the next round's start."""
    watched, server = federation(resfim(tau=0.8), parts(tiny))
    advance(watched, server, 1)
    for round in (2, 3):
        before = S.clone(server.state)
        advance(watched, server, round)
        sent = {u.client: (u.weight, kept(u), u.state) for u in watched.updates[-1]}
        ends = watched.ends(round)
        nobody = 0
        for name in watched.setting.keys:
            numerator = sum(w * (~masks[name]).double() * state[name] for w, masks, state in sent.values())
            denominator = sum(w * (~masks[name]).double() for w, masks, _ in sent.values())
            mean = torch.where(denominator > 0, numerator / denominator, before[name].double()).float()
            nobody += int((denominator == 0).sum())
            torch.testing.assert_close(server.state[name], mean)
            for client, (_, masks, _) in sent.items():
                own = torch.where(masks[name], ends[client][name], mean)
                torch.testing.assert_close(watched.engine.personal(client, server)[name], own)
        assert nobody > 0
    own = {client: watched.engine.personal(client, server) for client in watched.clients}
    advance(watched, server, 4)
    for client, start in watched.starts(4).items():
        assert S.digest(start) == S.digest(own[client])


def squared(model, state, split):
    """Mean over images of the squared gradient of the pixel-mean cross-entropy."""
    total = {name: torch.zeros_like(value) for name, value in state.items()}
    for x, y in zip(split.images, split.masks, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        log_p = call(model, leaves, x[None])[0].log_softmax(0)
        value = -log_p.gather(0, y[None].long()).mean()
        for name, g in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            total[name] += g**2 / len(split)
    return total


def in_style(x, amplitude, ratio):
    """By numpy: the amplitude inside the window, the own phase everywhere."""
    spectrum = np.fft.fft2(x.double().numpy())
    side = x.shape[-1]
    low = np.minimum(np.arange(side), side - np.arange(side)) <= int(ratio * side)
    window = low[:, None] & low[None, :]
    new = np.where(window, amplitude * np.exp(1j * np.angle(spectrum)), spectrum)
    return torch.from_numpy(np.fft.ifft2(new).real.clip(0, 1)).to(x)


@pytest.mark.parametrize("relative", [False, True])
def test_the_residual_is_the_mean_change_of_fisher_information_under_the_others_styles(tiny, relative):
    watched, server = federation(resfim(ratio=0.1), parts(tiny))
    advance(watched, server, 2)
    model, member = watched.setting.model.double(), watched.members[0]
    amplitudes = [np.abs(np.fft.fft2(m.data.images.double().numpy())).mean(0) for m in watched.members]
    member.data = Split(member.data.images.double(), member.data.masks)
    member.memory = {f"~bank/style/{k}": torch.from_numpy(amplitude) for k, amplitude in enumerate(amplitudes)}
    end = {name: value.double() for name, value in watched.ends(2)[0].items()}
    split = first(member.data)
    own, change = squared(model, end, split), {name: torch.zeros_like(value) for name, value in end.items()}
    for amplitude in amplitudes[1:]:
        moved = squared(model, end, Split(in_style(split.images, amplitude, 0.1), split.masks))
        change = {name: value + (moved[name] - own[name]).abs() / 2 for name, value in change.items()}
    if relative:
        change = {name: value / (own[name] + 1e-8) for name, value in change.items()}
    found = residual(ResFIM(ratio=0.1, images=3, relative=relative), member, end)
    assert found.keys() == change.keys()
    for name, value in change.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-12)


def test_a_first_mask_stays_where_it_is_asked_to(tiny):
    ever = {}
    for once in (True, False):
        watched, _, _ = run(resfim(once=once), parts(tiny), 4)
        ever[once] = [[S.digest(kept(u)) for u in updates] for updates in watched.updates[1:]]
    assert ever[True][0] == ever[True][1] == ever[True][2] == ever[False][0]
    assert ever[False][0] != ever[False][1]


def test_how_early_the_residual_sits_and_beyond_which_floor(tiny):
    watched, server, _ = run(resfim(ratio=0.1), parts(tiny), 2)
    model, member = watched.setting.model, watched.members[0]
    end, split = watched.engine.personal(0, server), first(member.data)
    amplitudes = [np.abs(np.fft.fft2(m.data.images.double().numpy())).mean(0) for m in watched.members]
    own = squared(model, end, split)
    moved = [squared(model, end, Split(in_style(split.images, a, 0.1), split.masks)) for a in amplitudes]
    change = [{name: (each[name] - own[name]).abs() for name in own} for each in moved]

    def early(change):
        total = {where: [0.0, 0.0] for where in ("encoder", "decoder", "head")}
        for name, value in change.items():
            region = watched.setting.keys[name].region
            total[region][0] += float(value.sum())
            total[region][1] += float(own[name].sum())
        (a, b), (c, d) = total["encoder"], total["decoder"]
        return math.log(a / b / (c / d))

    found = watched.setting.method.work.look(end, member)
    mean = early({name: (change[1][name] + change[2][name]) / 2 for name in own})
    assert found["early"] == pytest.approx(mean, abs=1e-3)
    assert found["beyond_floor"] == pytest.approx(mean - early(change[0]), abs=2e-3)


def test_where_all_images_have_one_style_there_is_no_residual(tiny):
    """And little where the clients have one mean style: F is taken on the images as they are."""
    plain = parts(tiny)
    common = np.abs(np.fft.fft2(plain[0].images.double().numpy())).mean(0)
    flat = [Split(in_style(0.5 + 0.2 * (p.images - 0.5), common, 0.05), p.masks) for p in plain]
    sizes = []
    for splits in (flat, 3 * plain[:1], plain):
        watched, _, _ = run(resfim(), splits, 2)
        end, work = watched.ends(2)[0], watched.setting.method.work
        own = squared(watched.setting.model, end, first(splits[0]))
        sizes.append(S.norm(residual(work, watched.members[0], end)) / S.norm(own))
    assert sizes[0] < 1e-3 < 10 * sizes[1] < sizes[2]


def test_the_lottery_draws_once_and_for_every_client_apart(tiny):
    watched, _, _ = run(resfim(score="lottery"), parts(tiny), 3)
    masks = [[kept(u) for u in updates] for updates in watched.updates[1:]]
    assert S.digest(masks[0]) == S.digest(masks[1])
    assert S.digest(masks[0][0]) != S.digest(masks[0][1])


def test_information_keeps_the_entries_that_the_loss_feels_most(tiny):
    watched, _, _ = run(resfim(score="information"), parts(tiny), 2)
    F = squared(watched.setting.model, watched.ends(2)[1], first(watched.members[1].data))
    for name, mask in kept(watched.updates[1][1]).items():
        if mask.any() and F[name].any():
            assert F[name][mask].min() >= F[name][~mask].max() * (1 - 1e-3)


def test_movement_keeps_what_this_rounds_training_moved_most(tiny):
    """From where the client began, its own kept entries included: not from the common mean."""
    watched, _, _ = run(resfim(score="movement", tau=0.4), parts(tiny), 3)
    start, end = watched.starts(3)[0], watched.ends(3)[0]
    for name, mask in kept(watched.updates[2][0]).items():
        moved = (end[name] - start[name]).abs()
        assert not mask.any() or moved[mask].min() >= moved[~mask].max()


def test_a_client_with_private_tensors_is_judged_with_them(tiny):
    """Its head stays and gets no mask; the information of the rest is that of the network with its own head."""
    watched, _, _ = run(resfim(shared=all_but_head, score="information"), parts(tiny), 2)
    F = squared(watched.setting.model, watched.ends(2)[2], first(watched.members[2].data))
    masks = kept(watched.updates[1][2])
    assert masks.keys() == {name for name in F if not name.startswith("head")}
    for name, mask in masks.items():
        if mask.any() and F[name].any():
            assert F[name][mask].min() >= F[name][~mask].max() * (1 - 1e-3)


def test_whole_directions_of_both_factors_stay_or_go(tiny):
    row = resfim("lora", level="direction", tau=0.5, score="movement")
    watched, _, _ = run(row, parts(tiny), 2, rank=4)
    start, end = watched.starts(2)[0], watched.ends(2)[0]
    masks = kept(watched.updates[1][0])
    for name in (n for n in masks if n.endswith(".A")):
        A, B = masks[name], masks[f"{name[:-1]}B"]
        stays = A[:, 0]
        assert torch.equal(A, stays[:, None].expand_as(A)) and torch.equal(B, stays.expand_as(B))
        assert stays.sum() == 2
        moved = [(end[n] - start[n]).abs() for n in (name, f"{name[:-1]}B")]
        score = moved[0].sum(1) + moved[1].sum(0)
        assert score[stays].min() >= score[~stays].max()


def test_a_share_of_directions_is_the_same_for_both_factors():
    """Rounded in directions, not in the entries of a wide A and a narrow B."""
    rng = torch.Generator().manual_seed(0)
    scores = {"l.A": torch.rand(4, 3, generator=rng), "l.B": torch.rand(50, 4, generator=rng), "h.D": torch.rand(2, 2)}
    for tau, n in ((0.05, 0), (0.2, 1), (0.6, 2), (1.0, 4)):
        masks = directions(scores, tau)
        assert masks.keys() == {"l.A", "l.B"}
        assert masks["l.A"].any(1).sum() == masks["l.B"].any(0).sum() == n


@pytest.mark.parametrize("row", [resfim(), METHODS["feddg"]], ids=["resfim", "feddg"])
def test_a_style_is_told_once_whenever_a_client_first_takes_part(tiny, row):
    watched, server = federation(row, parts(tiny))
    advance(watched, server, 4, {1: [0], 2: [0, 1], 3: [2, 0], 4: [0, 1, 2]}.__getitem__)
    told = [[u.client for u in updates if "~bank/style" in u.state] for updates in watched.updates]
    assert told == [[0], [1], [2], []]
    assert {n for n in server.state if n.startswith("~bank")} == {f"~bank/style/{k}" for k in range(3)}


def test_the_style_that_resfim_discloses_is_no_more_than_the_window(tiny):
    watched, server, _ = run(resfim(ratio=0.1), parts(tiny), 1)
    whole = np.abs(np.fft.fft2(watched.members[1].data.images.double().numpy())).mean(0)
    low = np.minimum(np.arange(16), 16 - np.arange(16)) <= 1
    expected = torch.from_numpy(np.where(low[:, None] & low[None, :], whole, 0.0)).float()
    torch.testing.assert_close(server.state["~bank/style/1"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["lottery", "movement"])
def test_norms_statistics_are_averaged_whole_also_where_a_score_would_have_them(tiny, score):
    row = resfim(score=score, tau=1.0, warmup=0)
    watched, _, _ = run(row, parts(tiny), 1, network=Normed, budget=replace(BUDGET, steps=1))
    statistics = {n for n in watched.setting.keys if n.endswith(("running_mean", "running_var"))}
    assert statistics and kept(watched.updates[0][1]).keys() == watched.setting.keys.keys() - statistics


@pytest.mark.parametrize(
    ("options", "said"),
    [({"score": "residuum"}, "unknown score 'residuum'.*residual"), ({"level": "row"}, "unknown level 'row'.*entry")],
)
def test_unknown_scores_and_levels_are_refused(options, said):
    with pytest.raises(FedloraError, match=said):
        ResFIM(**options)


# ---------------------------------------------------------------- Ditto


def test_dittos_personal_model_by_a_loop(tiny):
    """v <- v - lr (∇F(v) + lam (v - w)), w what came in; the global model is FedAvg's to the bit."""
    lam = 0.5
    watched, server = federation(replace(METHODS["ditto"], work=Ditto(lam)), parts(tiny), budget=SGD)
    plain, mean = federation("fedavg", parts(tiny), budget=SGD)
    v = {client: S.pick(server.state, is_model) for client in watched.clients}
    for round in (1, 2):
        w = S.clone(server.state)
        advance(watched, server, round), advance(plain, mean, round)
        assert S.digest(S.pick(server.state, is_model)) == S.digest(mean.state)
        for client in watched.clients:
            batches = watched.members[client].batches(round, SGD, "personal")
            for step in range(1, SGD.steps + 1):
                g = gradient(watched.setting.model, v[client], *batches(step))
                v[client] = {n: p - SGD.lr * (g[n] + lam * (p - w[n])) for n, p in v[client].items()}
            assert close(watched.engine.personal(client, server), v[client])


def test_ditto_without_a_pull_is_local_training(tiny):
    watched, server, _ = run(replace(METHODS["ditto"], work=Ditto(0.0)), parts(tiny), 2)
    alone, start = federation(Method("local", "full", nothing), parts(tiny))
    for client in watched.clients:
        v = start.state
        for round in (1, 2):
            v, _ = alone.members[client].fit(round, v, "personal")
        assert S.digest(watched.engine.personal(client, server)) == S.digest(v)


def test_a_strong_pull_ties_dittos_models_to_the_global_one(tiny):
    distances = []
    for lam in (0.0, 4.0, 9.0):
        watched, server = federation(replace(METHODS["ditto"], work=Ditto(lam)), parts(tiny), budget=SGD)
        advance(watched, server, 1)
        w = S.pick(server.state, is_model)
        advance(watched, server, 2)
        distances.append(sum(S.norm(S.sub(watched.engine.personal(k, server), w)) for k in watched.clients))
    assert distances[2] < 0.8 * distances[1] < 0.64 * distances[0]


# ---------------------------------------------------------------- FedAS


def class_means(model, state, split, classes):
    """By a loop over voxels: means and counts."""
    z = embed(model, state, split.images)[1]
    at = [[z[n, :, i, j] for n, i, j in (split.masks == c).nonzero().tolist()] for c in range(classes)]
    means = torch.stack([torch.stack(rows).mean(0) if rows else torch.zeros(z.shape[1]) for rows in at])
    return means, torch.tensor([float(len(rows)) for rows in at])


def test_the_alignment_takes_a_body_to_the_clients_own_prototypes(tiny):
    watched, _, _ = run("fedas", parts(tiny), 1)
    model, rng = watched.setting.model, torch.Generator().manual_seed(0)
    for member in watched.members[1:]:
        last = watched.ends(1)[member.number]
        start = {name: value + 0.1 * torch.randn(value.shape, generator=rng) for name, value in last.items()}
        target, counts = class_means(model, last, member.data, 6)
        end, _ = member.fit(2, start, "align", 12, objective=(ToMine(target),))
        distances = [
            float((class_means(model, state, member.data, 6)[0] - target)[counts > 0].square().sum())
            for state in (start, end)
        ]
        assert distances[1] < 0.5 * distances[0]


def test_from_the_second_round_on_training_begins_at_the_aligned_body(tiny):
    watched, server, _ = run("fedas", parts(tiny), 1)
    received = S.clone(server.state)
    advance(watched, server, 2)
    for client in watched.clients:
        (begin, aligned), (start, end) = [(b, e) for k, t, b, e in watched.fits if (k, t) == (client, 2)]
        assert all(torch.equal(begin[n], received[n]) for n in begin if not n.startswith("head"))
        assert S.digest(aligned) == S.digest(start)
        changed = {n for n in begin if not torch.equal(begin[n], aligned[n])}
        assert changed == {n for n in begin if not n.startswith("head")}
        sent = next(u.state for u in watched.updates[1] if u.client == client)
        assert all(torch.equal(value, end[n]) for n, value in sent.items() if is_model(n))


def test_the_alignment_of_the_first_round_is_none_and_its_gradient_by_hand(tiny):
    watched, _, _ = run("fedas", parts(tiny), 1)
    assert len(watched.fits) == 3
    member, model = watched.members[0], watched.setting.model
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    target[5] = 0  # a class that the client has never seen
    state = S.pick(watched.ends(1)[0], is_model)
    watched.setting.budget = replace(SGD, weight_decay=0.1)
    found, _ = member.fit(7, state, "align", 1, objective=(ToMine(target),))
    x, y = member.batches(7, replace(SGD, steps=1), "align")(1)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    z = embed(model, leaves, x)[1].movedim(1, -1)
    seen = [c for c in range(5) if (y == c).any()]
    value = sum((z[y == c].mean(0) - target[c]).square().mean() for c in seen) / len(seen)
    g = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for (name, p), own in zip(state.items(), g, strict=True):
        if own is None:
            assert name.startswith("head") and torch.equal(found[name], p)  # also under weight decay
        else:
            torch.testing.assert_close(found[name], p - SGD.lr * (own + 0.1 * p), rtol=1e-4, atol=1e-6)


def test_fedas_weighs_by_the_trace_of_fisher_information_and_keeps_heads(tiny):
    watched, server, records = run(replace(METHODS["fedas"], work=FedAS(images=3)), parts(tiny), 1)
    weights = []
    for update in watched.updates[0]:
        data = watched.members[update.client].data
        F = squared(watched.setting.model, watched.ends(1)[update.client], Split(data.images[:3], data.masks[:3]))
        weights.append(sum(float(value.sum()) for value in F.values()))
        assert float(update.state["~weight"]) == pytest.approx(weights[-1], rel=1e-3)
        assert not any(name.startswith("head") for name in update.state)
    for name in S.pick(watched.updates[0][0].state, is_model):
        mean = sum(w * u.state[name] for w, u in zip(weights, watched.updates[0], strict=True)) / sum(weights)
        torch.testing.assert_close(server.state[name], mean, rtol=1e-3, atol=1e-5)
    body = sum(4 * v.numel() for n, v in server.state.items() if not n.startswith("head"))
    assert records[0].bytes_up == 3 * (body + 4)
    for member in watched.members:
        own = watched.ends(1)[member.number]
        assert all(torch.equal(member.memory[n], own[n]) for n in own if n.startswith("head"))
        torch.testing.assert_close(member.memory["~mine"], class_means(watched.setting.model, own, member.data, 6)[0])


# ---------------------------------------------------------------- MOON


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


# ---------------------------------------------------------------- FedProto


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


# ---------------------------------------------------------------- HarmoFL and FedDG: styles


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


# ---------------------------------------------------------------- IOP-FL


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


# ---------------------------------------------------------------- FDLoRA


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


# ---------------------------------------------------------------- HetLoRA


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


# ---------------------------------------------------------------- FedALT


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


# ---------------------------------------------------------------- LC-Fed


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


@pytest.mark.parametrize(
    "work", [Calibrated(), Ditto(), FedAS(), Fusion(), MovingAverage(), OwnPair(), ResFIM(), SelfPruning(), Style()]
)
def test_every_work_has_words_for_the_table(work):
    assert 0 < len(work.label) < 80
    assert all(isinstance(name, str) and "~" in name for name in (*work.messages, *work.notes))


# ---------------------------------------------------------------- faults


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
