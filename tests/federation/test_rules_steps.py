"""Robust rules, server optimisers, FedNova and the rules that read messages, against loops and other libraries."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedlora_mini import state as S
from fedlora_mini.adapters import call, keys, prepare, trainable
from fedlora_mini.data import Split
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Budget, Server, Update, federate
from fedlora_mini.federation.aggregation import (
    FedAdam,
    FedAvgM,
    Krum,
    Nova,
    TrimmedMean,
    masked,
    mean,
    median,
    prototypes,
    residual,
    svd,
    weighted,
)
from fedlora_mini.federation.aggregation.nova import effort
from fedlora_mini.losses import task_loss
from fedlora_mini.models import build

WEIGHTS = (3.0, 1.0, 2.0, 5.0, 4.0)


def named(rule):
    """A rule's id: its bare name, the same in every process."""
    return getattr(rule, "__name__", type(rule).__name__)


def state(seed, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"layer.A": (3, 5), "layer.B": (7, 3), "head.D": (2, 3), "head.d": (2,)}
    return {n: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for n, shape in shapes.items()}


def clients(steps=(4, 1, 7, 2, 2), dtype=torch.float64, messages=lambda k: {}):
    return [Update(k, state(k, dtype) | messages(k), WEIGHTS[k], steps=tau) for k, tau in enumerate(steps)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# Robust rules


def test_median_and_trimmed_mean_are_those_of_other_libraries():
    updates = [Update(k, state(k), 1.0 + k) for k in range(10)]
    for name in state(0):
        values = np.stack([u.state[name].numpy() for u in updates])
        np.testing.assert_allclose(median(None, updates)[name].numpy(), np.median(values, 0), rtol=1e-12)
        np.testing.assert_allclose(median(None, updates[:7])[name].numpy(), np.median(values[:7], 0), rtol=1e-12)
        expected = stats.trim_mean(values, 0.2, axis=0)
        np.testing.assert_allclose(TrimmedMean(0.2)(None, updates)[name].numpy(), expected, rtol=1e-12)


def test_a_small_share_still_cuts_one_client():
    updates = clients()[:3]
    assert_same(TrimmedMean(0.01)(None, updates), median(None, updates))


@pytest.mark.parametrize(("f", "multi", "K"), [(1, 1, 5), (1, 3, 6), (2, 1, 7), (0, 2, 5)])
def test_krum_is_the_brute_force_loop(f, multi, K):
    updates = [Update(k, state(k), 1.0) for k in range(K)]
    flat = [torch.cat([u.state[n].flatten() for n in state(0)]).numpy() for u in updates]
    scores = []
    for i in range(K):
        near = sorted(sum((a - b) ** 2 for a, b in zip(flat[i], flat[j], strict=True)) for j in range(K) if j != i)
        scores.append(sum(near[: K - f - 2]))
    chosen = sorted(range(K), key=scores.__getitem__)[:multi]
    expected = S.mean([updates[k].state for k in chosen], [1.0] * multi)
    assert_same(Krum(f, multi)(None, updates), expected)


def test_krum_survives_as_many_as_the_number_of_clients_allows():
    """(K - 3) // 2 unless told: none of three, one of five, two of seven."""
    for K, f in ((3, 0), (4, 0), (5, 1), (6, 1), (7, 2)):
        updates = [Update(k, state(k), 1.0) for k in range(K)]
        assert_same(Krum()(None, updates), Krum(f)(None, updates))


@pytest.mark.parametrize("rule", [median, TrimmedMean(), Krum(), Krum(multi=3)], ids=named)
@pytest.mark.parametrize("huge", [1e6, -1e30], ids=str)
def test_robust_rules_survive_one_client_with_huge_values(rule, huge):
    updates = clients()
    updates[3] = Update(3, {n: torch.full_like(v, huge) for n, v in updates[3].state.items()}, 1e9)
    honest = [u.state for u in updates if u.client != 3]
    for name, value in rule(None, updates).items():
        values = torch.stack([s[name] for s in honest])
        assert (value >= values.amin(0)).all() and (value <= values.amax(0)).all()
    assert S.norm(mean(None, updates)) > 1e5


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Krum(1)(None, clients()[:4]), "at least 5 clients, got 4"),
        (lambda: Krum()(None, clients()[:2]), "at least 3 clients, got 2"),
        (lambda: Krum(multi=5)(None, clients()), "at most 4 of 5"),
        (lambda: Krum(byzantine=-1), "byzantine >= 0"),
        (lambda: Krum(multi=0), "multi >= 1"),
        (lambda: TrimmedMean(0.5), r"\(0, 0.5\)"),
        (lambda: TrimmedMean(0.2)(None, clients()[:2]), "more than 2 clients, got 2"),
    ],
)
def test_robust_rules_refuse_impossible_numbers(act, said):
    with pytest.raises(FedloraError, match=said):
        act()


# Server optimisers


def rounds(rule, server, count=3):
    """The server after some rounds of changing clients, and the means that it saw."""
    means = []
    for t in range(count):
        updates = [Update(k, state(10 * t + k), w) for k, w in enumerate(WEIGHTS)]
        means.append(mean(None, updates))
        server = server | rule(server, updates)
    return server, means


@pytest.mark.parametrize("nesterov", [False, True])
def test_server_momentum_is_the_hand_written_loop(nesterov):
    found, means = rounds(FedAvgM(lr=0.5, momentum=0.8, nesterov=nesterov), state(9))
    for name, start in state(9).items():
        theta, m = start.numpy().copy(), 0.0
        for goal in means:
            change = goal[name].numpy() - theta
            m = 0.8 * m + change
            theta = theta + 0.5 * (change + 0.8 * m if nesterov else m)
        np.testing.assert_allclose(found[name].numpy(), theta, rtol=1e-12)
        np.testing.assert_allclose(found[f"~~m/{name}"].numpy(), m, rtol=1e-12)


def test_server_adam_is_the_hand_written_loop():
    found, means = rounds(FedAdam(lr=0.1, beta1=0.8, beta2=0.95, tau=0.02), state(9))
    for name, start in state(9).items():
        theta, m, v = start.numpy().copy(), 0.0, 0.02**2
        for goal in means:
            change = goal[name].numpy() - theta
            m, v = 0.8 * m + 0.2 * change, 0.95 * v + 0.05 * change**2
            theta = theta + 0.1 * m / (np.sqrt(v) + 0.02)
        np.testing.assert_allclose(found[name].numpy(), theta, rtol=1e-12)
        np.testing.assert_allclose(found[f"~~v/{name}"].numpy(), v, rtol=1e-12)


def test_server_momentum_without_memory_is_the_rule_inside():
    plain = FedAvgM(momentum=0.0, inner=svd)(state(9), clients())
    assert_same({n: v for n, v in plain.items() if "~" not in n}, svd(state(9), clients()))


@pytest.mark.parametrize("rule", [FedAvgM(momentum=0.9, lr=3.0), FedAdam(lr=10.0), Nova()], ids=named)
def test_running_statistics_are_averaged_never_extrapolated(rule):
    var = "norm.running_var"
    updates = [
        Update(k, {var: torch.tensor([v]), "w.D": torch.tensor([v])}, 1.0, steps=s)
        for k, (v, s) in enumerate([(0.1, 9), (0.3, 1)])
    ]
    out = rule({var: torch.tensor([1.0]), "w.D": torch.tensor([1.0])}, updates)
    assert out[var].item() == pytest.approx(0.2)
    assert abs(out["w.D"].item() - 0.2) > 0.1


def test_server_momentum_against_the_optimiser_of_torch():
    """Δ as a negative gradient: torch's SGD has the same momentum, Nesterov's included."""
    for nesterov in (False, True):
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        sgd, rule = torch.optim.SGD([theta], lr=0.5, momentum=0.8, nesterov=nesterov), FedAvgM(0.5, 0.8, nesterov)
        server = {"w.D": torch.zeros(3, dtype=torch.float64)}
        for t in range(4):
            goal = state(t)["layer.A"][0, :3]
            theta.grad = theta.detach() - goal
            sgd.step()
            server |= rule(server, [Update(0, {"w.D": goal}, 1.0)])
        torch.testing.assert_close(server["w.D"], theta.detach())


def test_notes_of_the_rule_inside_pass_a_server_optimiser():
    updates = clients(messages=lambda k: {"~prototype": torch.ones(2, 1), "~count": torch.tensor([1, 0])})
    out = FedAvgM(inner=prototypes)(state(9), updates)
    assert out["~count"].tolist() == [5, 0] and "~~m/head.D" in out and "~~m/~count" not in out


def test_a_server_optimiser_refuses_what_has_no_step():
    with pytest.raises(FedloraError, match=r"the rule inside returned '.*fold"):
        FedAvgM(inner=residual)(state(9), clients())


# FedNova


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_effort_is_how_far_a_constant_gradient_carries(rho):
    """||a||_1: the path of SGD with momentum at rate 1 along a gradient of 1."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=1.0, momentum=rho)
    for steps in range(1, 8):
        x.grad = -torch.ones_like(x)
        optimiser.step()
        assert effort(steps, rho) == pytest.approx(x.item(), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_nova_is_the_formula_of_the_card(rho):
    updates, server = clients(), state(9)
    p = [w / sum(WEIGHTS) for w in WEIGHTS]
    a = [(u.steps - rho * (1 - rho**u.steps) / (1 - rho)) / (1 - rho) for u in updates]
    tau = sum(p_k * a_k for p_k, a_k in zip(p, a, strict=True))
    for name, value in Nova(rho)(server, updates).items():
        d = sum(p_k * (server[name] - u.state[name]) / a_k for p_k, u, a_k in zip(p, updates, a, strict=True))
        torch.testing.assert_close(value, server[name] - tau * d)


def test_nova_at_equal_steps_is_the_mean():
    updates = clients(steps=(6,) * 5, dtype=torch.float32)
    assert S.digest(Nova()(state(9, dtype=torch.float32), updates)) == S.digest(mean(None, updates))


def trained(name, data, sizes=(2, 4, 8), passes=1.0):
    """(server's state after a round, before it, every client's end by a plain SGD loop on the batches that it drew)."""
    row, budget = METHODS[name], Budget(steps=3, batch=2, lr=0.05, optimiser="sgd", augment=False, passes=passes)
    model = prepare(build("minisam", len(data.classes), d=16, depth=1, stem=4, width=4), row.adapter).double()
    parts = zip(data.sites, sizes, strict=True)
    splits = [Split(site.train.images[:n].double(), site.train.masks[:n]) for site, n in parts]
    start = trainable(model)
    engine, server = LocalEngine(model, row, keys(model, list(start)), splits, budget), Server(start)
    ends = []
    for member in engine.members:
        own = budget.of(len(member.data))
        end, batches = {n: v.clone() for n, v in start.items()}, member.batches(1, own)
        for step in range(1, own.steps + 1):
            leaves = {n: v.requires_grad_() for n, v in end.items()}
            x, y = batches(step)
            loss = task_loss(call(model, leaves, x), y).mean()
            slope = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            moved = zip(leaves.items(), slope, strict=True)
            end = {n: (v if g is None else v - budget.lr * g).detach() for (n, v), g in moved}
        ends.append(end)
    list(federate(row, engine, server, engine.keys, 1, budget.steps, lambda t: engine.clients))
    return server.state, start, ends


def test_a_round_of_fednova_with_unequal_clients_is_the_formula_of_the_card(tiny):
    """w <- w - tau_eff sum_k p_k (w - w_k) / tau_k, after one pass through 2, 4 and 8 images in batches of 2."""
    found, start, ends = trained("fednova", tiny)
    p, tau = (1 / 7, 2 / 7, 4 / 7), (1, 2, 4)
    tau_eff = sum(p_k * t for p_k, t in zip(p, tau, strict=True))  # 3
    for name, w in start.items():
        d = sum(p_k * (w - end[name]) / t for p_k, t, end in zip(p, tau, ends, strict=True))
        torch.testing.assert_close(found[name], w - tau_eff * d, rtol=1e-10, atol=1e-12)
    plain, *_ = trained("fedavg", tiny)
    assert any((found[name] - plain[name]).abs().max() > 1e-4 for name in start), "FedAvg weighs work, too"


def test_fednova_is_fedavg_where_all_clients_take_equal_steps(tiny):
    nova, plain = (trained(name, tiny, passes=None)[0] for name in ("fednova", "fedavg"))
    assert S.norm(S.sub(nova, plain)) < 1e-12 * S.norm(plain)


def test_nova_does_not_favour_the_client_that_works_more():
    """Two clients with opposite constant gradients and unequal steps: the server stays; the mean moves."""
    updates = [
        Update(0, {"w.D": torch.tensor([9.0])}, 1.0, steps=9),
        Update(1, {"w.D": torch.tensor([-1.0])}, 1.0, steps=1),
    ]
    server = {"w.D": torch.tensor([0.0])}
    assert Nova()(server, updates)["w.D"].item() == pytest.approx(0, abs=1e-6)
    assert mean(server, updates)["w.D"].item() == 4


def test_nova_refuses():
    with pytest.raises(FedloraError, match="momentum"):
        Nova(momentum=1.0)
    with pytest.raises(FedloraError, match="at least 1 local step"):
        Nova()(state(9), clients(steps=(0,) * 5))


# Rules that read messages


def test_weighted_counts_by_the_clients_own_number():
    updates = clients(messages=lambda k: {"~weight": torch.tensor(1.0 + k)})
    expected = S.mean([S.pick(u.state, lambda n: "~" not in n) for u in updates], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert_same(weighted(state(9), updates), expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "client 0 sent no '~weight'"), (torch.ones(2), "is one number"), (torch.tensor(-1.0), "non-negative")],
)
def test_weighted_refuses(value, said):
    with pytest.raises(FedloraError, match=said):
        weighted(state(9), [Update(0, state(0) | ({} if value is None else {"~weight": value}), 1.0)])


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8], ids=str)
def test_masked_is_the_loop_over_entries(kind):
    rng, server = torch.Generator().manual_seed(0), state(9)
    masks = [
        {f"{n}~mask": torch.rand(v.shape, generator=rng) > 0.4 for n, v in server.items() if n != "head.d"}
        for _ in WEIGHTS
    ]
    updates = clients(messages=masks.__getitem__)
    for u in updates:
        for name in state(0):
            if f"{name}~mask" in u.state:
                u.state[f"{name}~mask"].view(-1)[0] = False  # an entry that nobody gives
                u.state[f"{name}~mask"] = u.state[f"{name}~mask"].to(kind)
    out = masked(server, updates)
    assert out.keys() == server.keys()
    for name, value in out.items():
        for i in range(value.numel()):
            given = [
                (u.weight, u.state[name].view(-1)[i].item())
                for u in updates
                if f"{name}~mask" not in u.state or u.state[f"{name}~mask"].view(-1)[i]
            ]
            total = sum(w for w, _ in given)
            expected = sum(w * v for w, v in given) / total if given else server[name].view(-1)[i].item()
            assert value.view(-1)[i].item() == pytest.approx(expected, rel=1e-12)
        if name != "head.d":
            assert value.view(-1)[0] == server[name].view(-1)[0]


def test_masked_with_everything_given_is_the_mean():
    full = [
        Update(u.client, u.state | {f"{n}~mask": torch.ones_like(v) for n, v in u.state.items()}, u.weight)
        for u in clients()
    ]
    assert_same(masked(state(9), full), mean(None, clients()))
    with pytest.raises(FedloraError, match="without the tensor"):
        masked(state(9), [Update(0, {"x.A~mask": torch.ones(1)}, 1.0)])


def test_prototypes_are_means_over_the_samples_of_a_class():
    rows = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    updates = clients(messages=lambda k: {"~prototype": rows[k], "~count": torch.tensor([k, 2 * k, 0])})
    old = {"~prototype": torch.full((3, 4), 7.0), "~count": torch.tensor([1, 1, 5])}
    out = prototypes(state(9) | old, updates)
    for c in (0, 1):
        n = [int(u.state["~count"][c]) for u in updates]
        expected = sum(k * u.state["~prototype"][c] for k, u in zip(n, updates, strict=True)) / sum(n)
        torch.testing.assert_close(out["~prototype"][c], expected)
        assert out["~count"][c] == sum(n)
    assert (out["~prototype"][2] == 7).all() and out["~count"][2] == 5  # nobody has the class: the server's row
    assert_same({n: out[n] for n in state(0)}, mean(None, clients()))
    first = prototypes(state(9), updates)
    assert first["~count"].tolist() == [10, 20, 0] and not first["~prototype"][2].any()
    with pytest.raises(FedloraError, match="client 0 sent no '~prototype'"):
        prototypes(state(9), clients())
