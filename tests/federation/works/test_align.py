"""FedAS by hand: a body aligned to the client's own prototypes, and weights by Fisher information."""

from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters.features import embed
from fedlora_mini.data import Split
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.exchange import is_model
from fedlora_mini.federation.works import FedAS
from fedlora_mini.federation.works.align import ToMine
from watched import SGD, advance, class_means, parts, run, squared


def test_the_alignment_takes_a_body_to_the_clients_own_prototypes(tiny):
    watched, _, _ = run("fedas", parts(tiny), 1)
    model, rng = watched.setting.model, torch.Generator().manual_seed(0)
    for member in watched.members[1:]:
        last = watched.ends(1)[member.number]
        start = {name: value + 0.1 * torch.randn(value.shape, generator=rng) for name, value in last.items()}
        target, counts = class_means(model, last, member.data, 6)
        end, _ = member.fit(2, start, "align", replace(member.setting.budget, steps=12), objective=(ToMine(target),))
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
    found, _ = member.fit(7, state, "align", replace(member.setting.budget, steps=1), objective=(ToMine(target),))
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


def test_the_papers_alignment_is_one_pass_at_a_rate_of_its_own(tiny):
    """In the place of two steps at the run's rate; training itself keeps the run's budget."""
    watched, _, _ = run("fedas", parts(tiny), 1)
    member, asked = watched.members[0], {}
    fit = member.fit

    def spy(round, start=None, purpose="batches", budget=None, **row):
        asked.setdefault(purpose, []).append(budget)
        return fit(round, start, purpose, budget, **row)

    member.fit = spy
    for work in (FedAS(), FedAS(passes=1, rate=0.03)):
        work.round(member, 2)
    ours, paper = (budget.of(len(member.data)) for budget in asked["align"])
    own = watched.setting.budget
    assert (ours.steps, ours.lr) == (2, own.lr) and asked["batches"] == [None, None]
    assert (paper.steps, paper.lr) == (round(len(member.data) / own.batch), 0.03)
