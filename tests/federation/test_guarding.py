"""Federations under a privacy budget: which rows may, what clients are given, and that a budget ends a run."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.adapters.registry import ADAPTERS
from fedlora_mini.data import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import parse_arm
from fedlora_mini.federation import METHODS, Budget, Request, Server, federate
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.sampling import generator
from fedlora_mini.models import build, zoo
from fedlora_mini.privacy import DPSGD, BudgetSpent, Doppler, LowPass, Release, epsilon

BUDGET = Budget(steps=3, batch=2, lr=1e-2, augment=False)
PRIVATE = Guarding(DPSGD(1.0, 0.5, 1.0))


def federation(name, data, guard=PRIVATE, budget=BUDGET, execution="auto", row=None, dtype=torch.float64):
    row = METHODS[name] if row is None else row
    model = prepare(build("minisam", len(data.classes), d=16, depth=1, stem=4, width=4), row.adapter).to(dtype)
    start = trainable(model)
    splits = [type(site.train)(site.train.images.to(dtype), site.train.masks) for site in data.sites]
    engine = LocalEngine(model, row, keys(model, list(start)), splits, budget, 0, execution, guard=guard)
    return engine, Server(start)


def advance(engine, server, rounds=2):
    row, layers = engine.method, engine.setting.layers
    everyone = lambda round: engine.clients  # noqa: E731
    return list(federate(row, engine, server, engine.keys, rounds, BUDGET.steps, everyone, layers=layers))


FREE = [n for n, m in METHODS.items() if m.work.free and all(t.free for t in m.objective)]
GROUPABLE = [n for n in FREE if ADAPTERS[METHODS[n].adapter].grouped]
FEW = ("fedit", "ffa", "iat", "fedavg")  # what `make quick` looks at
ZOO = ("minisam", "unet", "swin_unetr")  # and of networks
ALONE = [n for n in GROUPABLE if not METHODS[n].pooled]  # a pooled client's batch holds three sites' images


@pytest.mark.parametrize("name", METHODS)
def test_only_rows_that_tell_nothing_but_gradients_may_be_private(tiny, name):
    """Without a budget a work may tell more, but no term may read images beside the private gradient."""
    row, budgeted = METHODS[name], replace(PRIVATE, budget=8.0)
    refused = pytest.raises(FedloraError, match=f"'{row.title}'")
    assert (name in FREE) == (not PRIVATE.not_dp(row) and all(term.free for term in row.objective))
    own = ADAPTERS[row.adapter].grouped  # a network's own weights have no gradients by image
    other = nullcontext() if own else pytest.raises(FedloraError, match="own weights: private gradients need a row")
    with other if name in FREE else refused:
        federation(name, tiny, budgeted)
    with other if all(term.free for term in row.objective) else refused:
        federation(name, tiny)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ALONE])
def test_without_noise_clipping_and_sampling_it_is_the_plain_run_on_all_images(tiny, name):
    """In float64, with SGD: batches hold the same images in another order."""
    whole = Budget(steps=3, batch=len(tiny.sites[0].train), lr=1e-2, optimiser="sgd", augment=False)
    ends = []
    for guard in (None, Guarding(DPSGD(0.0, 1.0, math.inf))):
        engine, server = federation(name, tiny, guard, whole, "sequential")
        advance(engine, server)
        ends.append([server.state, *(engine.memory[k] for k in engine.clients)])
    for a, b in zip(*ends, strict=True):
        assert S.norm(S.sub(a, b)) <= 1e-9 * S.norm(a)


def test_links_of_a_chain_act_one_after_the_other(tiny):
    """Two filters behind the noise are one that does both; none of them alone is."""

    class Both(Doppler):
        label = "both in one"

        def gradient_(self, gradient, state, context):
            LowPass().gradient_(gradient, state, context)
            super().gradient_(gradient, state, context)

    digests = []
    for chain in ((LowPass(), Doppler()), (Both(),), (LowPass(),), (Doppler(),)):
        engine, server = federation("fedit", tiny, row=replace(METHODS["fedit"], objective=chain))
        advance(engine, server)
        digests.append(S.digest(server.state))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_the_same_seed_gives_the_same_bytes_and_secure_noise_does_not(tiny):
    digests = []
    for secure in (False, False, True):
        engine, server = federation("fedit", tiny, Guarding(DPSGD(1.0, 0.5), secure=secure))
        advance(engine, server)
        digests.append(S.digest(server.state))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
def test_secure_samples_differ_from_build_to_build_and_seeded_ones_do_not(tiny, execution):
    """Without noise, so that the coins alone tell the builds apart."""
    for secure in (False, True):
        guard, ends = Guarding(DPSGD(0.0, 0.5), secure=secure), []
        for _ in range(2):
            engine, server = federation("fedit", tiny, guard, execution=execution)
            advance(engine, server)
            ends.append(S.digest(server.state))
        assert (ends[0] == ends[1]) == (not secure)


def test_seeded_samples_are_those_of_the_generator_and_secure_ones_are_not(tiny):
    budget = replace(BUDGET, steps=20, augment=True)
    engine, _ = federation("fedit", tiny, budget=budget)
    member, n = engine.members[1], len(engine.members[1].data)
    rng = generator(0, 2, 1, "batches")
    draw = member.batches(2, budget)
    for step in range(1, 21):
        rows = torch.nonzero(torch.rand(n, generator=rng, dtype=torch.float64) < 0.5)[:, 0]
        x, y = member.data.images[rows], member.data.masks[rows]
        for axis in (1, 2):
            chosen = torch.rand(len(y), generator=rng) < 0.5
            x = torch.where(chosen.view(-1, 1, 1, 1), x.flip(axis + 1), x)
        assert torch.equal(draw(step)[0], x)
    secure, _ = federation("fedit", tiny, replace(PRIVATE, secure=True), budget)
    draws = [secure.members[1].batches(2, budget) for _ in range(2)]
    sizes = [[len(draw(step)[0]) for step in range(1, 21)] for draw in draws]
    assert sizes[0] != sizes[1], "the same round of the same client"


def test_noise_differs_between_clients_rounds_and_steps(tiny):
    """With no image drawn and SGD, a step is the noise."""
    budget = Budget(steps=2, batch=2, lr=1.0, optimiser="sgd", augment=False)
    budgets = [replace(budget, steps=steps) for steps in (1, 2)]
    ends = []
    for round in (1, 2):
        for each in budgets:
            engine, server = federation("fedit", tiny, Guarding(DPSGD(1.0, 1e-9, 1e-9)), budget)
            ends.append([member.fit(round, budget=each)[0] for member in engine.members])
    ends = [end for round in (ends[:2], ends[2:]) for pair in zip(*round, strict=True) for end in pair]
    moved = [torch.cat([v.flatten() for v in S.sub(end, server.state).values()]) for end in ends]
    second = [two - one for one, two in zip(moved[::2], moved[1::2], strict=True)]
    draws = torch.stack([*moved[::2], *second])
    assert torch.corrcoef(draws).sub(torch.eye(len(draws))).abs().max() < 0.2


def test_noise_serves_once(tiny):
    """Of two releases with the same noise the difference is bare: refused, and not written down."""
    engine, _ = federation("fedit", tiny)
    member = engine.members[0]
    member.fit(1)
    with pytest.raises(FedloraError, match="client 0 has released gradients of round 1 for 'batches' already"):
        member.fit(1)
    assert [r.times for r in member.ledger.releases] == [3]
    member.fit(1, purpose="another")
    member.fit(2)
    secure, _ = federation("fedit", tiny, replace(PRIVATE, secure=True))
    ends = [secure.members[0].fit(1)[0] for _ in range(2)]  # the system's noise is never the same
    assert S.norm(S.sub(*ends)) > 0


def test_losses_are_not_told(tiny):
    engine, server = federation("fedit", tiny)
    assert [r.loss for r in advance(engine, server)] == [None, None]


def test_every_fit_is_written_down_before_it_happens(tiny):
    engine, server = federation("ffa", tiny)
    advance(engine, server, rounds=4)
    for member in engine.members:
        assert member.ledger.releases == [Release(1.0, 0.5, 12)]
        assert member.ledger.spent() == epsilon([Release(1.0, 0.5, 12)], 1e-5)


def test_a_client_stops_before_it_exceeds_its_budget_and_stays_as_it_was(tiny):
    enough = epsilon([Release(1.0, 0.5, 6)], 1e-5)  # for two rounds of three steps
    engine, server = federation("iat", tiny, Guarding(DPSGD(1.0, 0.5), enough))
    advance(engine, server, rounds=2)
    member = engine.members[1]
    before = S.digest(member.memory)
    with pytest.raises(BudgetSpent, match="3 more release"):
        member.answer(Request(3, {}))
    assert S.digest(member.memory) == before and member.ledger.releases == [Release(1.0, 0.5, 6)]


def test_filters_change_the_released_gradient_and_nothing_else(tiny):
    plain, filtered = (
        federation("fedit", tiny, row=replace(METHODS["fedit"], objective=terms)) for terms in ((), (LowPass(),))
    )
    a, b = (
        m.fit(1, budget=replace(m.setting.budget, steps=1))[0] for m in (e.members[0] for e, _ in (plain, filtered))
    )
    head = [name for name in a if name.startswith("head")]
    assert head and all(torch.equal(a[name], b[name]) for name in head)
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
def test_no_image_decides_whether_a_clients_update_is_refused(tiny, execution):
    images = tiny.sites[1].train.images.clone()
    images[0] = math.nan
    broken = replace(tiny.sites[1], train=replace(tiny.sites[1].train, images=images))
    data = replace(tiny, sites=(tiny.sites[0], broken, *tiny.sites[2:]))
    engine, server = federation("fedit", data, Guarding(DPSGD(1.0, 1.0)), execution=execution)
    records = advance(engine, server)
    assert [record.refused for record in records] == [[], []] and S.finite(server.state)


@pytest.mark.parametrize("arm", ["fedit", "ffa", "rolora", "la_lora:filter=low-pass", "la_lora_pre", "fedprox"])
def test_all_clients_in_one_pass_end_like_one_after_the_other(tiny, arm):
    """Each with its own Poisson batches, clipping, noise and divisor."""
    name, change = parse_arm(arm)
    ends = []
    for execution in ("sequential", "grouped"):
        row = METHODS[name].but(**change)
        budget = replace(BUDGET, optimiser="sgd")
        engine, server = federation(name, tiny, Guarding(DPSGD(1.0, 0.4, 0.1)), budget, execution, row)
        assert engine.grouped == (execution == "grouped")
        advance(engine, server, rounds=3)
        assert [member.ledger.releases for member in engine.members] == [[Release(1.0, 0.4, 9)]] * 3
        ends.append(server.state)
    assert S.norm(S.sub(*ends)) <= 1e-9 * S.norm(ends[0])


def test_one_pass_pays_up_to_small_batches_and_cannot_be_had_where_clients_do_more(tiny):
    assert federation("fedit", tiny, execution="auto")[0].grouped
    assert not federation("fedit", tiny, budget=replace(BUDGET, batch=32), execution="auto")[0].grouped
    assert not federation("as_lora", tiny, execution="auto")[0].grouped
    with pytest.raises(FedloraError, match="sequential"):
        federation("as_lora", tiny, execution="grouped")


def test_a_models_own_weights_have_no_per_sample_gradients(tiny):
    with pytest.raises(FedloraError, match="own weights: private gradients need a row"):
        federation("fedavg", tiny)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ZOO)) for n in zoo.MODELS])
def test_every_network_of_the_zoo_trains_privately(name):
    """One step of SGD on all images: without noise no client moves further than lr C, with noise all of it moves."""
    entry, C = zoo.MODELS[name], 0.1
    side = 64 if name == "unetr" else entry.smallest
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *(side,) * entry.dims, generator=g)
    splits = [Split(image[None], (image[None].mean(1) > 0.5).to(torch.uint8)) for image in x]
    budget = Budget(steps=1, batch=1, lr=0.5, optimiser="sgd", augment=False)
    for sigma in (0.0, 1.0):
        model = prepare(zoo.build(name, classes=2), "lora", rank=2)
        start = trainable(model)
        guard = Guarding(DPSGD(sigma, 1.0, C))
        engine = LocalEngine(model, METHODS["fedit"], keys(model, list(start)), splits, budget, 0, guard=guard)
        updates = list(engine.exchange({k: Request(1, start) for k in engine.clients}))
        for update in updates:
            change = S.sub(update.state, start)
            assert S.finite(update.state) and change.keys() == start.keys()
            if sigma:
                assert all(value.all() for value in change.values())
            else:
                assert 0 < S.norm(change) <= 0.5 * C * (1 + 1e-4)
