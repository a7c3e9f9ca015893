"""The text of a row: it differs where rows do, and in no other process."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from fedlora_mini.experiments.provenance import text_of


class Term:
    def __init__(self, **state):
        self.__dict__.update(state)

    def act(self):
        return 1


def closed(value):
    return lambda x: x + value


def with_default(value):
    return lambda x, by=value: x + by


MAKERS = {
    "a number": lambda v: v,
    "what a function closes over": closed,
    "a default": with_default,
    "a method's owner": lambda v: Term(lam=v).act,
    "a partial": lambda v: partial(max, v),
    "a tensor": lambda v: Term(weight=torch.full((2,), v)),
    "a set": lambda v: Term(names={"A", "B", str(v)}),
    "a mapping": lambda v: {"x": [v]},
}


@pytest.mark.parametrize("what", MAKERS)
def test_parts_that_differ_have_other_texts_and_equal_ones_the_same(what):
    make = MAKERS[what]
    assert text_of(make(1.0)) == text_of(make(1.0)) != text_of(make(2.0))


def test_a_part_that_holds_itself_has_a_text():
    term = Term(lam=1.0)
    term.owner = term
    assert "itself" in text_of(term)


def test_every_row_has_one_text_in_all_processes():
    code = (
        "from fedlora_mini.federation import METHODS; from fedlora_mini.experiments.provenance import text_of; "
        "print([text_of(row) for row in METHODS.values()], text_of(set('abcdef')))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and b" at 0x" not in told[0]
