"""Local training against loops written by hand: the optimisers, the pace, and every hook of a regulariser."""

import itertools
import math

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import adapters, call, keys, prepare, trainable
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.client import PACES, Budget, constant, cosine, train
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.schedule import Schedule, together
from fedlora_mini.federation.sharing import everything
from fedlora_mini.losses import segmentation_loss
from fedlora_mini.models import build
from fedlora_mini.regularizers import Regularizer

LR = 1e-2


@pytest.fixture(scope="module")
def model():
    """In double precision and away from the start; nothing here changes it."""
    torch.set_num_threads(1)
    model = prepare(build("minisam", 2, d=16, depth=1, stem=4, width=4), "lora", rank=2).double()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=g).double()
    return model


def batch(client, step):
    """Another batch for every client and step."""
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1000 * client + step)).double()
    return x, (x[:, client % 3] > 0.6).to(torch.uint8)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "None"), (torch.zeros(2), r"a tensor \(2,\)"), ("0", "'0'")], ids=["none", "two", "text"]
)
def test_a_penalty_that_is_no_number_is_named(model, value, got):
    class Mine(Regularizer):
        def penalty(self, state, context):
            return value

    for clients in ((0,), (0, 1)):
        with pytest.raises(FedloraError, match=f"penalty of 'Mine' is {got}; it must be one number"):
            fit(model, Mine(), clients=clients)


def fit(model, *terms, clients=(0,), schedule=together, start=None, round=1, stop=None, seen=None, **budget):
    """End states and losses of the clients, in one pass."""
    own = trainable(model)
    starts = [own if start is None else start] * len(clients)

    def batches(step):
        if seen is not None:
            seen.append(step)
        parts = [batch(client, step) for client in clients]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    method = Method("", "lora", everything, schedule, objective=terms)
    size = Budget(**{"steps": 4, "batch": 2, "lr": LR} | budget)
    stopping = {} if stop is None else {"stop": stop}
    return train(model, method, keys(model, list(own)), starts, batches, size, round, **stopping)


def gradient(model, state, step, view=None, extra=lambda leaves: 0.0):
    """The loss and its gradient at one state, on client 0's batch."""
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    x, y = batch(0, step)
    value = segmentation_loss(call(model, leaves | (view or {}), x), y).mean()
    return value.item(), dict(
        zip(leaves, torch.autograd.grad(value + extra(leaves), list(leaves.values())), strict=True)
    )


class Adam:
    """One tensor's AdamW, from its two formulas."""

    def __init__(self):
        self.t, self.m, self.u = 0, 0.0, 0.0

    def __call__(self, p, g, lr=LR, decay=0.0):
        self.t += 1
        self.m, self.u = 0.9 * self.m + 0.1 * g, 0.999 * self.u + 0.001 * g**2
        mean, square = self.m / (1 - 0.9**self.t), self.u / (1 - 0.999**self.t)
        return (1 - lr * decay) * p - lr * mean / (square.sqrt() + 1e-8)


def by_hand(model, steps, change=lambda step, gradient, optimisers: gradient, decay=0.0, pace=constant, view=None):
    """Adam on client 0's batches. `change` may alter the gradient, leave names out of it or put new optimisers in."""
    state = trainable(model)
    optimisers, losses = {name: Adam() for name in state}, []
    for step in range(1, steps + 1):
        loss, g = gradient(model, state, step, view(step) if view else None)
        losses.append(loss)
        for name, own in change(step, g, optimisers).items():
            state[name] = optimisers[name](state[name], own, LR * pace(step / steps), decay)
    return state, sum(losses) / len(losses)


def same(a, b, tolerance=1e-9):
    return S.norm(S.sub(a, b)) < tolerance * S.norm(b)


class Spy(Regularizer):
    """Notes what it is called with."""

    def __init__(self, name="spy", notes=None):
        self.label, self.notes = name, [] if notes is None else notes

    def note(self, hook, state, context, gradient=None):
        values = S.clone(state), None if gradient is None else S.clone(gradient)
        self.notes.append((hook, self.label, context, *values))

    def view(self, state, context):
        self.note("view", state, context)
        return {}

    def penalty(self, state, context):
        self.note("penalty", state, context)
        return 0.0

    def gradient_(self, gradient, state, context):
        self.note("gradient", state, context, gradient)

    def prox_(self, state, context):
        self.note("prox", state, context)


def is_A(name):
    return name.endswith(".A")


# ---------------------------------------------------------------- without terms


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("pace", PACES)
def test_adam_with_decoupled_decay_and_the_pace(model, decay, pace):
    [end], [loss] = fit(model, weight_decay=decay, pace=pace, steps=5)
    expected, mean = by_hand(model, 5, decay=decay, pace=PACES[pace])
    assert same(end, expected) and loss == pytest.approx(mean)


def test_sgd_is_a_step_against_the_gradient(model):
    [end], _ = fit(model, optimiser="sgd", steps=1, weight_decay=0.1)
    state = trainable(model)
    _, g = gradient(model, state, 1)
    assert same(end, {name: p - LR * (g[name] + 0.1 * p) for name, p in state.items()}, 1e-12)


def test_the_start_and_the_model_are_left_alone(model):
    before, start = S.digest(model.state_dict()), trainable(model)
    given = S.clone(start)
    fit(model, start=given)
    assert S.digest(model.state_dict()) == before and S.digest(given) == S.digest(start)


def test_what_the_schedule_holds_still_keeps_its_bits(model):
    """Also under weight decay; at every step anew."""
    alternate = Schedule("A at odd steps", lambda key, round, step, steps: (key.factor == "A") == bool(step % 2))
    notes = []
    [end], _ = fit(model, Spy(notes=notes), schedule=alternate, steps=4, weight_decay=0.1)
    ends = {c.step: state for hook, _, c, state, _ in notes if hook == "prox"}
    before = trainable(model)
    for step in range(1, 5):
        moved = {name for name in before if not torch.equal(before[name], ends[step][name])}
        assert moved == {name for name in before if is_A(name) == bool(step % 2)}
        before = ends[step]
    moves = {c.step: c.moves for hook, _, c, _, _ in notes if hook == "view"}
    assert moves == {step: frozenset(name for name in end if is_A(name) == bool(step % 2)) for step in range(1, 5)}


def test_the_cosine():
    """Up in a straight line over a twentieth, down as half a cosine: against its values in closed form."""
    values = {0.025: 0.5, 0.05: 1.0, 0.05 + 0.95 / 3: 0.75, 0.525: 0.5, 0.05 + 0.95 * 2 / 3: 0.25, 1.0: 0.0}
    for done, value in values.items():
        assert cosine(done) == pytest.approx(value, abs=1e-12)
    assert cosine(0.25, warmup=0.5) == 0.5 and cosine(0.75, warmup=0.5) == pytest.approx(0.5)
    grid = [cosine(k / 1000) for k in range(1, 1001)]
    assert grid[:50] == sorted(grid[:50]) and grid[49:] == sorted(grid[49:], reverse=True)
    assert {constant(k / 10) for k in range(1, 11)} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pace": "cosin"}, r"unknown pace 'cosin'; accepted: constant, cosine\. Did you mean 'cosine'"),
        ({"optimiser": "adamw"}, "unknown optimiser 'adamw'; accepted: adam, sgd"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
    ],
)
def test_budgets_that_are_refused(options, message):
    with pytest.raises(FedloraError, match=message):
        Budget(**options)


# ---------------------------------------------------------------- stop


def test_stop_ends_after_the_step_that_it_is_asked_about(model):
    asked, seen = [], []

    def stop(step, losses):
        asked.append((step, losses))
        return step == 3

    ends, means = fit(model, steps=10, stop=stop, seen=seen)
    assert seen == [1, 2, 3] == [step for step, _ in asked]
    expected, losses = fit(model, steps=3)
    assert S.digest(ends) == S.digest(expected) and means == losses
    assert means == pytest.approx([sum(own[0] for _, own in asked) / 3])


def test_stop_sees_a_loss_for_every_client(model):
    asked = []
    fit(model, clients=(0, 1, 2), steps=2, stop=lambda step, losses: asked.append(losses) or False)
    alone = [fit(model, clients=(k,), steps=1)[1][0] for k in range(3)]
    assert len(asked) == 2 and asked[0] == pytest.approx(alone)


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("clients", [(0,), (0, 1)])
def test_the_order_of_the_hooks(model, clients):
    """view -> forward -> penalty -> gradient -> optimiser -> prox, term after term, the same for every client."""
    notes = []
    hook = model.register_forward_hook(lambda *_: notes.append(("forward", "", None, None, None)))
    try:
        fit(model, Spy("a", notes), Spy("b", notes), clients=clients, steps=2)
    finally:
        hook.remove()
    once = [("view", "a"), ("view", "b"), ("forward", "")]
    once += [(hook, term) for hook in ("penalty", "gradient", "prox") for term in "ab"]
    for k in range(len(clients)):
        index = k if len(clients) > 1 else None
        assert [note[:2] for note in notes if note[2] is None or note[2].index == index] == 2 * once
    phases = [hook for hook, _ in itertools.groupby(note[0] for note in notes)]  # over all clients
    assert phases == 2 * ["view", "forward", "penalty", "gradient", "prox"]


def test_the_optimiser_steps_between_gradient_and_prox_by_what_gradient_left(model):
    class Half(Spy):
        def gradient_(self, gradient, state, context):
            for name in gradient:
                gradient[name] = gradient[name] / 2
            super().gradient_(gradient, state, context)

    notes = []
    fit(model, Half("half", notes), Spy("after", notes), optimiser="sgd", steps=1)
    by_hook = {(hook, term): (state, gradient) for hook, term, _, state, gradient in notes}
    start = trainable(model)
    _, g = gradient(model, start, 1)
    left = by_hook["gradient", "after"][1]
    assert same(left, S.scale(g, 0.5))
    assert S.digest(by_hook["gradient", "after"][0]) == S.digest(start)
    assert same(by_hook["prox", "half"][0], S.add(start, left, -LR), 1e-14)


def test_what_the_context_says(model):
    first, second = [], []
    schedule = Schedule("no A", lambda key, round, step, steps: key.factor != "A")
    fit(model, Spy(notes=first), steps=4, pace="cosine", round=3, schedule=schedule)
    start = trainable(model)
    for _, _, c, _, _ in first:
        assert (c.round, c.steps, c.index) == (3, 4, None)
        assert c.pace == cosine(c.step / 4) and c.lr == pytest.approx(LR * c.pace)
        assert S.digest(c.start) == S.digest(start) and c.keys == keys(model, list(start))
        assert c.layers == dict(adapters(model)) and c.moves == {n for n in start if not is_A(n)}
        assert c.memory is first[0][2].memory and not c.restart
    assert [c.step for hook, _, c, _, _ in first if hook == "prox"] == [1, 2, 3, 4]
    fit(model, Spy(notes=second), steps=1)
    assert second[0][2].memory is not first[0][2].memory  # a round begins with an empty one
    grouped = []
    fit(model, Spy(notes=grouped), clients=(0, 1, 2), steps=1)
    memories = {c.index: c.memory for _, _, c, _, _ in grouped}
    assert set(memories) == {0, 1, 2} and len({id(m) for m in memories.values()}) == 3


def test_every_client_is_shown_its_own_state_and_gradient(model):
    notes = []
    fit(model, Spy(notes=notes), clients=(0, 1), steps=2)
    for k in (0, 1):
        alone = []
        fit(model, Spy(notes=alone), clients=(k,), steps=2)
        own = [note for note in notes if note[2].index == k]
        for (_, _, _, state, g), (_, _, _, expected, h) in zip(own, alone, strict=True):
            assert same(state, expected) and (g is None or same(g, h))


class Drop(Regularizer):
    """Takes the A's out of the gradient at some steps."""

    label = "drop"

    def __init__(self, steps):
        self.steps = steps

    def gradient_(self, gradient, state, context):
        if context.step in self.steps:
            for name in filter(is_A, list(gradient)):
                del gradient[name]


@pytest.mark.parametrize("clients", [(0,), (0, 1)])
def test_a_name_taken_out_of_the_gradient_is_left_alone_by_the_optimiser(model, clients):
    """No step, no decay, to the bit."""
    ends, _ = fit(model, Drop(range(1, 5)), clients=clients, weight_decay=0.1)
    start = trainable(model)
    for end in ends:
        assert {name for name in end if torch.equal(end[name], start[name])} == set(filter(is_A, start))


def test_nor_do_its_moments_move_while_it_is_out(model):
    """Out at steps 2 and 3: at step 4 Adam goes on from its moments of step 1."""

    def change(step, g, optimisers):
        return {name: own for name, own in g.items() if not (is_A(name) and step in (2, 3))}

    [end], _ = fit(model, Drop((2, 3)), weight_decay=0.1, steps=5)
    assert same(end, by_hand(model, 5, change, decay=0.1)[0])


class Restart(Regularizer):
    label = "restart"
    grouped = False

    def prox_(self, state, context):
        if context.step == 3:
            context.restart.update(filter(is_A, state))


def test_restart_forgets_adams_moments_of_these_names(model):
    """After step 3 the A's begin with Adam's first step again, everything else goes on."""

    def change(step, g, optimisers):
        if step == 4:
            optimisers.update({name: Adam() for name in g if is_A(name)})
        return g

    [end], _ = fit(model, Restart(), steps=6)
    assert same(end, by_hand(model, 6, change)[0])
    assert not same(end, fit(model, steps=6)[0][0], 1e-6)


class Again(Regularizer):
    """Notes the gradient at the moved state; has a penalty and a view, which belong to the objective."""

    label = "again"
    grouped = False

    def __init__(self, path, size):
        self.path, self.size, self.notes = path, size, []

    def perturbed(self, weight):
        return {f"{self.path}.base.weight": weight + self.size}

    def extra(self, state):
        return self.size * sum(value.square().sum() for name, value in state.items() if is_A(name))

    def view(self, state, context):
        return self.perturbed(context.layers[self.path].base.weight)

    def penalty(self, state, context):
        return self.extra(state)

    def prox_(self, state, context):
        self.notes.append((context.step, S.clone(state), context.again()))


def test_again_is_the_gradient_of_the_whole_objective_where_the_state_is_now(model):
    path = "encoder.blocks.0.qkv"
    term = Again(path, 0.05)
    fit(model, term, steps=3)
    assert [step for step, _, _ in term.notes] == [1, 2, 3]
    for step, state, found in term.notes:
        view = term.perturbed(model.get_submodule(path).base.weight)
        _, expected = gradient(model, state, step, view, term.extra)
        assert same(found, expected, 1e-12)
        assert not same(found, gradient(model, state, step)[1], 1e-3)


def test_again_gives_what_moves_and_changes_no_step(model):
    only_B = Schedule("only B", lambda key, round, step, steps: key.factor == "B")
    term = Again("encoder.blocks.0.qkv", 0.0)
    [end], _ = fit(model, term, schedule=only_B)
    assert all({name.rpartition(".")[2] for name in found} == {"B"} for _, _, found in term.notes)
    assert S.digest(end) == S.digest(fit(model, schedule=only_B)[0][0])


def test_again_is_refused_where_clients_share_a_pass(model):
    class Asks(Regularizer):
        def prox_(self, state, context):
            context.again()

    with pytest.raises(FedloraError, match="only where clients train one after the other"):
        fit(model, Asks(), clients=(0, 1))


def test_a_view_replaces_a_frozen_weight_for_one_forward_pass(model):
    """Seen at step 2 alone, where the gradient is the one at the other weight; the model's own keeps its bits."""
    path = "decoder.mix1.base.weight"
    other = torch.randn(model.get_parameter(path).shape, generator=torch.Generator().manual_seed(3)).double()

    class Once(Regularizer):
        grouped = False

        def view(self, state, context):
            return {path: other} if context.step == 2 else {}

    before = S.digest(model.state_dict())
    [end], [loss] = fit(model, Once(), steps=4)
    expected, mean = by_hand(model, 4, view=lambda step: {path: other} if step == 2 else {})
    assert same(end, expected) and loss == pytest.approx(mean)
    assert S.digest(model.state_dict()) == before
    assert not same(end, fit(model)[0][0], 1e-6)


def test_penalties_are_added_to_the_loss_and_not_to_the_report(model):
    class Square(Regularizer):
        def penalty(self, state, context):
            return 3 * sum(value.square().sum() for value in state.values())

    [end], [loss] = fit(model, Square(), Square(), optimiser="sgd", steps=1)
    start = trainable(model)
    value, g = gradient(model, start, 1)
    assert same(end, {name: p - LR * (g[name] + 12 * p) for name, p in start.items()}, 1e-12)
    assert loss == pytest.approx(value)


class Everything(Regularizer):
    """Uses every hook that clients in one pass may use, and what differs between them: state, data, memory, start."""

    label = "everything"

    def penalty(self, state, context):
        moved = [(state[name] - context.start[name]).square().sum() for name in context.of("A", state)]
        return 0.1 * torch.stack(moved).sum()

    def gradient_(self, gradient, state, context):
        size = context.memory.get("size", 1.0)
        context.memory["size"] = 0.5 * size + 0.5 * S.norm(gradient)
        for name in list(gradient):
            gradient[name] = gradient[name] / size
            if is_A(name) and context.step == 2:
                del gradient[name]

    def prox_(self, state, context):
        for name in context.of("B", state):
            state[name].mul_(1 - context.lr * context.memory["size"])
            state[name][state[name].abs() < 1e-3] = 0.0


@pytest.mark.parametrize("options", [{}, {"optimiser": "sgd"}, {"pace": "cosine", "weight_decay": 0.1}])
def test_grouped_clients_end_like_sequential_ones_under_every_hook(model, options):
    terms, clients = (Everything(), Drop((3,))), (0, 1, 2)
    ends, losses = fit(model, *terms, clients=clients, **options)
    alone = [fit(model, *terms, clients=(k,), **options) for k in clients]
    for end, loss, ([expected], [value]) in zip(ends, losses, alone, strict=True):
        assert same(end, expected, 1e-8) and loss == pytest.approx(value)
    assert not same(ends[0], ends[1], 1e-6)


def test_a_term_that_needs_clients_one_after_the_other_is_named(model):
    """Before anything is computed."""
    seen = []
    with pytest.raises(FedloraError, match="'restart' needs clients one after the other: use execution 'sequential'"):
        fit(model, Drop((1,)), Restart(), clients=(0, 1), seen=seen)
    assert not seen and math.isfinite(fit(model, Restart(), clients=(0,))[1][0])
