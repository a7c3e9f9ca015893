"""A row says at once what is wrong with its cells, and a lambda may say what is shared."""

from dataclasses import replace

import pytest

from fedlora_mini.adapters.base import Key
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS, Method
from fedlora_mini.federation.sharing import everything, factors, nothing
from fedlora_mini.regularizers import SOR

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
    ],
)
def test_a_wrong_cell_is_named(cells, words):
    with pytest.raises(FedloraError, match=words):
        Method(**({"title": "mine", "adapter": "lora", "shared": everything} | cells))


def test_a_plain_function_may_say_what_is_shared():
    row = Method("mine", "lora", lambda key: key.factor == "A")
    assert row.shared(Key("encoder.x", "A", "encoder", "linear")) and not row.shared(KEYS["head.layer.weight"])
    assert row.keeps_nothing(KEYS, "minisam") == "" and row.shared.label


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


def test_a_text_on_the_command_line_can_be_a_truth_value():
    assert METHODS["resfim"].but(once="yes").work.once is True
    assert replace(METHODS["resfim"].work, once=True) == METHODS["resfim"].but(once="True").work
