"""`free=True` is no mere word: under privacy such a term cannot read an image, in one pass or one by one."""

from dataclasses import dataclass, replace

import pytest
import torch

from fedlora_mini.adapters import keys, prepare, trainable
from fedlora_mini.engines import LocalEngine
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Budget, Server, federate
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.models import build
from fedlora_mini.privacy import DPSGD
from fedlora_mini.regularizers import Regularizer
from fedlora_mini.regularizers.base import IMAGES

BUDGET = Budget(steps=1, batch=2, lr=1e-2, optimiser="sgd", augment=False)


@dataclass(frozen=True)
class Peeping(Regularizer):
    """Says that it is free, and reads what it should not."""

    name: str
    hook: str

    label = "peeping"
    free = True

    def look(self, hook, context):
        if hook == self.hook:
            getattr(context, self.name)

    def penalty(self, state, context):
        self.look("penalty", context)
        return 0.0

    def gradient_(self, gradient, state, context):
        self.look("gradient_", context)

    def prox_(self, state, context):
        self.look("prox_", context)


@dataclass(frozen=True)
class Repainting(Regularizer):
    label = "repainting"
    free = True

    def images(self, x, kept):
        return 1 - x


def one_round(tiny, term, execution, guard):
    row = replace(METHODS["fedit"], objective=(term,))
    model = prepare(build("minisam", len(tiny.classes), d=16, depth=1, stem=4, width=4), row.adapter)
    start = trainable(model)
    table, splits = keys(model, list(start)), [site.train for site in tiny.sites]
    engine = LocalEngine(model, row, table, splits, BUDGET, 0, execution, guard=guard)
    return list(federate(row, engine, Server(start), table, 1, BUDGET.steps, lambda t: engine.clients))


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
@pytest.mark.parametrize("hook", ["penalty", "gradient_", "prox_"])
@pytest.mark.parametrize("name", IMAGES)
def test_under_a_guard_a_free_term_reads_no_image(tiny, name, hook, execution):
    with pytest.raises(FedloraError, match=f"'peeping' calls itself free, and reads images by context.{name}"):
        one_round(tiny, Peeping(name, hook), execution, Guarding(DPSGD(1.0, 0.2)))


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
@pytest.mark.parametrize("name", ["start", "moves", "memory", "restart", "step", "layers"])
def test_it_reads_all_the_rest(tiny, name, execution):
    [told] = one_round(tiny, Peeping(name, "gradient_"), execution, Guarding(DPSGD(1.0, 0.2)))
    assert not told.refused


def test_without_a_guard_nothing_is_withheld(tiny):
    [told] = one_round(tiny, Peeping("x", "gradient_"), "sequential", None)
    assert not told.refused


def test_under_a_guard_no_term_changes_images(tiny):
    with pytest.raises(FedloraError, match="'repainting' changes the images of a step"):
        one_round(tiny, Repainting(), "sequential", Guarding(DPSGD(1.0, 0.2)))


def test_under_a_budget_a_work_cannot_add_a_term_that_reads_images(tiny):
    from fedlora_mini.federation.works.selection import Recorder

    row = METHODS["fedit"]
    model = prepare(build("minisam", len(tiny.classes), d=16, depth=1, stem=4, width=4), row.adapter)
    start = trainable(model)
    args = (model, row, keys(model, list(start)), [site.train for site in tiny.sites], BUDGET, 0, "sequential")
    for budget in (10.0, float("inf")):
        member = LocalEngine(*args, guard=Guarding(DPSGD(1.0, 0.2), budget)).members[0]
        member.memory = start
        recorder = Recorder(raw=True)
        if budget < float("inf"):
            with pytest.raises(FedloraError, match="reads images beside the private gradient"):
                member.fit(1, objective=(recorder,))
        else:
            member.fit(1, objective=(recorder,))
            assert recorder.drawn[0].dim() == 4 and torch.equal(recorder.drawn[1], recorder.drawn[1].round())
