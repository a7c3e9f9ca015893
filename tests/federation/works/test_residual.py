"""pFL-ResFIM by hand: whose change of Fisher information decides what stays at the site."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Method
from fedlora_mini.federation.aggregation import aggregation_error
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.sharing import all_but_head, everything, nothing
from fedlora_mini.federation.works import ResFIM
from fedlora_mini.federation.works.residual import SCORES, directions, residual, sensitive
from watched import BUDGET, Normed, advance, federation, models, parts, run, squared


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


@pytest.mark.parametrize("tau", [-0.5, 1.5, float("nan")])
def test_a_share_outside_of_zero_and_one_is_refused(tau):
    with pytest.raises(FedloraError, match=rf"tau is a share in \[0, 1\], got {tau}"):
        sensitive(torch.zeros(4), tau)


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


def test_the_aggregation_error_of_a_masked_round_by_hand(tiny):
    """What a client keeps stands at the server's start in its ΔW; from the zeros in its place the error is above 1."""
    watched, server = federation(resfim("lora", tau=0.5), parts(tiny), budget=replace(BUDGET, lr=3e-2))
    advance(watched, server, 1)
    layers = watched.setting.layers
    for round in (2, 3):
        before = S.clone(server.state)
        advance(watched, server, round)
        updates, lost, size = watched.updates[-1], 0.0, 0.0
        total = sum(update.weight for update in updates)
        for path in (p for p, layer in layers.items() if not layer.linear):
            mean = 0.0
            for update in updates:
                B, A = (
                    torch.where(kept(update)[n], before[n], update.state[n]).double()
                    for n in (f"{path}.B", f"{path}.A")
                )
                mean = mean + update.weight / total * B @ A
            new = server.state[f"{path}.B"].double() @ server.state[f"{path}.A"].double()
            lost += float((mean - new).square().sum())
            size += float(mean.square().sum())
        found = aggregation_error(watched.setting.model, before, server.state, updates, lambda name: False)
        assert found == pytest.approx((lost / size) ** 0.5, rel=1e-6) and 0 < found < 1


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


@pytest.mark.slow
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


def keep_the_largest(masks, F):
    """Whether no entry outside a mask has more than one inside; a bias before a norm has nothing but rounding."""
    rounding = 1e-9 * max(float(value.max()) for value in F.values())
    some = [(F[name][mask], F[name][~mask]) for name, mask in masks.items() if mask.any() and F[name].any()]
    return bool(some) and all(inside.min() >= outside.max() * (1 - 1e-3) - rounding for inside, outside in some)


def test_information_keeps_the_entries_that_the_loss_feels_most(tiny):
    watched, _, _ = run(resfim(score="information"), parts(tiny), 2)
    F = squared(watched.setting.model, watched.ends(2)[1], first(watched.members[1].data))
    masks = kept(watched.updates[1][1])
    assert keep_the_largest(masks, F) and not keep_the_largest({name: ~mask for name, mask in masks.items()}, F)


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
    assert keep_the_largest(masks, F)


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


def test_directions_are_refused_where_there_are_none_before_anything_trains(tiny):
    with pytest.raises(FedloraError, match="level 'direction' needs factors A and B, as in row 'resfim_lora'"):
        run(resfim(level="direction"), parts(tiny), 1)


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
