import numpy as np
import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.arms import arm_of, parse_arm, title_of
from fedlora_mini.experiments.compare import Comparison
from fedlora_mini.experiments.report import arms, summary, table_of

TINY = {"sites": "2", "size": 32, "rounds": 2, "steps": 2, "batch": 2, "rank": 2, "threads": 1, "leakage": True}
TINY |= {"data_options": {"per_site": 6, "val": 2, "test": 3}}


@pytest.mark.parametrize(
    ("text", "name", "change"),
    [
        ("fedit", "fedit", {}),
        ("resfim:score=lottery,tau=0.1", "resfim", {"score": "lottery", "tau": 0.1}),
        ("harmofl:on=true", "harmofl", {"on": True}),
    ],
)
def test_an_arm_is_read_and_written_back(text, name, change):
    assert parse_arm(text) == (name, change)
    assert arm_of({"method": name, "change": change}) == text


def test_the_order_of_changes_is_no_other_arm():
    one, other = (arm_of({"method": "x", "change": c}) for c in ({"a": 1, "b": "y"}, {"b": "y", "a": 1}))
    assert one == other == "x:a=1,b=y"


@pytest.mark.parametrize("text", ["fedit:", "fedit:lam", "fedit:=1", "fedit:lam=", "fedit:lam=1,lam=2"])
def test_an_arm_that_is_not_understood_is_named(text):
    with pytest.raises(FedloraError, match=f"arm '{text}'"):
        parse_arm(text)


def test_a_title_says_what_is_changed():
    assert title_of("iat_sor:form=exact,lam=0.01") == "IAT + SOR (form=exact, lam=0.01)"
    assert title_of("iat") == "IAT sharing"


@pytest.mark.slow
def test_two_arms_of_one_row_are_compared_and_their_leakage_is_read(tmp_path):
    torch.set_num_threads(1)
    names = ["iat_sor:form=exact,lam=0.5", "iat_sor"]
    results = Comparison(names, [0, 1], TINY, tmp_path).run()
    assert arms(results) == names and [r["config"]["change"] for r in results[:2]] == [
        {"form": "exact", "lam": 0.5},
        {},
    ]
    assert list(summary(results).index) == [title_of(name) for name in names]
    for name, own in zip(names, (results[::2], results[1::2]), strict=True):
        cos2 = [np.mean([each["leak_cos2"] for each in r["leakage"]["rounds"]]) for r in own]
        assert table_of(results, name, "leakage", "leak_cos2").tolist() == [[each] for each in cos2]
        assert table_of(results, name, "leakage", "swap_drop").tolist() == [r["leakage"]["swap_drop"] for r in own]
        assert table_of(results, name, "leakage", "swap_drop").shape == (2, 2)
    assert not table_of(results, "fedit", "leakage", "leak_cos2").size


def test_an_arm_with_a_number_that_its_row_has_not_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(FedloraError, match="unknown setting of 'FedIT' 'lam'"):
        Comparison(["local", "fedit:lam=1"], [0], TINY, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
