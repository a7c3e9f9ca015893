"""A run's settings are of their own type, or named before anything runs; whatever was stored can be read again."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: "2"}, f"{name} is a whole number, got '2'") for name in ("rounds", "steps", "rank", "size", "micro")),
        *(({name: "3"}, f"{name} is a finite number.*, got '3'") for name in ("lr", "epsilon", "delta", "fraction")),
        *(({name: 2.5}, f"{name} is a whole number, got 2.5") for name in ("rounds", "steps", "batch", "seed")),
        ({"batch": 2.0}, "batch is a whole number, got 2.0"),
        ({"rounds": math.inf}, "rounds is a whole number, got inf"),
        ({"rounds": True}, "rounds is a whole number, got True"),
        ({"augment": "perhaps"}, r"augment is true or false \(also yes, no, 1, 0\), got 'perhaps'"),
        ({"change": None}, "change is a dict, got None"),
        ({"data_options": [("per_site", 4)]}, "data_options is a dict"),
        ({"method": 3}, "method is a text, got 3"),
        ({"data": None}, "data is a text, got None"),
        ({"method": "hetlora", "ranks": "2,4"}, "ranks is a list, got '2,4'"),
        ({"method": "hetlora", "ranks": [2, 2.5]}, "each of the ranks is a whole number, got 2.5"),
        ({"ranks": [2, 4]}, "'fedit' cannot combine unequal ranks, as flora, hetlora, flexlora can"),
        ({"clip": 0}, "clip: the clipping norm C must be positive, got 0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
    ],
)
def test_a_setting_of_another_type_is_named(changes, words):
    with pytest.raises(FedloraError, match=words):
        RunConfig(**changes)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"augment": "no"}, {"augment": False}),
        ({"lr": 1}, {"lr": 1}),
        ({"data": Path("my") / "hospitals"}, {"data": str(Path("my") / "hospitals")}),
        ({"method": "hetlora", "ranks": (2, 4)}, {"ranks": [2, 4]}),
        ({"sites": ("a", "b")}, {"sites": ("a", "b")}),
        ({"sites": 2, "unseen": "a,b"}, {"sites": 2, "unseen": "a,b"}),
        ({"rounds": np.int64(3), "lr": np.float32(0.5), "leakage": np.bool_(True)}, {"rounds": 3, "lr": 0.5}),
    ],
)
def test_what_is_meant_is_kept_as_json_has_it(given, kept):
    config = RunConfig(**given)
    assert {name: getattr(config, name) for name in kept} == kept
    assert RunConfig.read(json.loads(json.dumps(config.asdict()))).key() == config.key()


def test_stored_configurations_can_be_read_and_stay_as_they_are():
    """The first and the last of every file; a record of `nearness` holds more than a run's settings."""
    files = [path for path in sorted(RESULTS.glob("*.jsonl")) if path.stem != "nearness"]
    lines = [path.read_text(encoding="utf-8").splitlines() for path in files]
    ends = [json.loads(each[place]) for each in lines for place in (0, -1)]
    configs = [each["config"] for each in ends if {"method", "rounds"} <= each.get("config", {}).keys()]
    assert len(configs) > 100
    for config in configs:
        read = RunConfig.read(config).asdict()
        assert json.dumps({name: read[name] for name in config}) == json.dumps(config)
