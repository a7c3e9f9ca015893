"""A row says at once what is wrong with its cells, and a lambda may say what is shared."""

import re
from dataclasses import dataclass, replace

import pytest

from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Method
from fedlora_mini.federation.aggregation import Krum
from fedlora_mini.federation.schedule import Schedule, by_round, by_step, only
from fedlora_mini.federation.sharing import everything, factors, nothing
from fedlora_mini.regularizers import SOR, Regularizer

KEYS = {
    f"{region}.layer.{factor}": Key(f"{region}.layer", factor, region, "linear")
    for region, factor in (("encoder", "scale"), ("decoder", "scale"), ("head", "weight"))
}


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"adapter": "loraa"}, "unknown adapter 'loraa'.*Did you mean 'lora'"),
        ({"objective": SOR()}, r"'mine': objective is a tuple of terms, such as \(SOR\(\),\), got SOR"),
        ({"objective": (SOR,)}, "objective is a tuple of terms"),
        ({"shared": "A"}, "'mine': shared is a function Key -> bool or a Sharing, got 'A'"),
        ({"work": "ditto"}, "'mine': work is a Work"),
        ({"shared": lambda: True}, "shared is a function Key -> bool"),
        ({"rule": "mean"}, r"'mine': rule is a function \(server, updates\) -> tensors by name, .* got 'mean'"),
        ({"rule": Krum}, "rule is .* an instance such as Stack.*, got <class"),
        ({"rule": lambda updates: {}}, "rule is a function"),
        ({"schedule": "A"}, r"schedule is a function \(Key, round, step, steps\) -> bool or a Schedule, got 'A'"),
        ({"schedule": lambda key: True}, "schedule is a function"),
        ({"schedule": Schedule}, "schedule is a function"),
    ],
)
def test_a_wrong_cell_is_named(cells, words):
    with pytest.raises(FedloraError, match=words):
        Method(**({"title": "mine", "adapter": "lora", "shared": everything} | cells))


def test_a_plain_function_may_say_what_is_shared():
    row = Method("mine", "lora", lambda key: key.factor == "A")
    assert row.shared(Key("encoder.x", "A", "encoder", "linear")) and not row.shared(KEYS["head.layer.weight"])
    assert row.keeps_nothing(KEYS, "minisam") == "" and row.shared.label


def test_a_plain_function_may_say_what_moves():
    row = Method("mine", "ia3", everything, lambda key, round, step, steps: key.region == "head" or step == 2)
    assert row.schedule.label and row.schedule.may_move(KEYS["encoder.layer.scale"], 1, 2)
    assert not row.schedule(KEYS["encoder.layer.scale"], 1, 1, 2) and row.rests(KEYS, 1)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (
            {"shared": factors("scale", "B", head=True)},
            "'mine' shares .*, and adapter 'ia3' has no factor 'B' in the de",
        ),
        ({"shared": factors("A", "scale", head=True)}, "no factor 'A' in the encoder; its factors there: scale"),
        ({"schedule": only("B")}, "'mine' has the schedule 'A never moves', .* no factor 'B' in the encoder"),
        ({"schedule": by_round("scale", "A")}, "no factor 'A'"),
        ({"schedule": by_step("A", "scale")}, "no factor 'A'"),
        ({"schedule": only("scale")}, ""),
        ({"shared": factors("scale", "scale", head=False)}, ""),
    ],
)
def test_a_factor_that_the_adapter_has_not_is_named(cells, words):
    told = Method(**({"title": "mine", "adapter": "ia3", "shared": everything} | cells)).misnames(KEYS)
    assert re.search(words, told) if words else told == ""


def test_where_a_region_has_no_layers_nothing_is_asked_of_it():
    heads = {name: key for name, key in KEYS.items() if key.region == "head"}
    assert Method("mine", "head", factors("A", "B", head=True), only("B")).misnames(heads) == ""


@pytest.mark.parametrize(
    ("shared", "silent"),
    [
        (factors("A", "B", head=False), True),
        (lambda key: False, True),
        (factors("A", "B", head=True), False),
        (everything, False),
        (nothing, False),
    ],
)
def test_a_row_that_would_send_nothing_says_which_factors_there_are(shared, silent):
    told = Method("mine", "ia3", shared).sends_nothing(KEYS)
    assert ("its factors: scale, weight" in told) == bool(told) == silent


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fedprox", {"mu": "abc"}, "setting 'mu' of 'FedIT . FedProx' is a finite number, got 'abc'"),
        ("fedprox", {"mu": -1}, r"mu must be in \[0, inf\), got -1"),
        ("fedadam", {"lr": "abc"}, "setting 'lr'.*a finite number"),
        ("fedadam", {"lr": 0}, r"lr must be in \(0, inf\)"),
        ("fedavgm", {"momentum": 1}, r"momentum must be in \[0, 1\)"),
        ("as_lora", {"warmup": float("nan")}, "setting 'warmup'.*a whole number or none, got nan"),
        ("as_lora", {"memory": "x"}, "setting 'memory'.*a finite number"),
        ("ditto", {"lam": -1}, r"lam must be in \[0, inf\)"),
        ("resfim", {"tau": 2}, r"tau must be in \[0, 1\], got 2"),
        ("resfim", {"once": "maybe"}, "setting 'once'.*true or false"),
        ("moon", {"tau": 0}, r"tau must be in \(0, inf\)"),
        ("iat_sor", {"lam": -0.1}, r"lam must be in \[0, inf\)"),
        ("hetlora", {"gamma": 1.5}, r"gamma must be in \(0, 1\)"),
        ("iop", {"keep": 2}, r"keep must be in \[0, 1\]"),
        ("fedas", {"images": 0}, r"images must be in \[1, inf\)"),
        ("fdlora", {"trials": 1.5}, "setting 'trials'.*a whole number"),
    ],
)
def test_a_part_refuses_nonsense(name, change, words):
    with pytest.raises(FedloraError, match=words):
        METHODS[name].but(**change)


@dataclass(frozen=True)
class Late(Regularizer):
    """Annotated as in a file with `from __future__ import annotations`."""

    strength: "float" = 1.0


def test_annotations_may_stand_as_text():
    row = Method("mine", "lora", everything, objective=(Late(),))
    assert row.but(strength=2).objective == (Late(2),)
    with pytest.raises(FedloraError, match="setting 'strength' of 'mine' is a finite number, got 'abc'"):
        row.but(strength="abc")


def test_a_text_on_the_command_line_can_be_a_truth_value():
    assert METHODS["resfim"].but(once="yes").work.once is True
    assert replace(METHODS["resfim"].work, once=True) == METHODS["resfim"].but(once="True").work
