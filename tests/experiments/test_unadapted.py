import json

import pytest

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import unadapted
from fedlora_mini.experiments.unadapted import SETS, config_of, key_of, main


def keys_of(lines):
    return [key_of(json.loads(line)["config"]) for line in lines]


def test_no_two_records_have_one_key():
    keys = [key_of(config_of(name, seed).asdict()) for name, (_, seeds) in SETS.items() for seed in seeds]
    assert len(set(keys)) == len(keys) == sum(len(seeds) for _, seeds in SETS.values())


def test_a_named_set_is_made_again_and_the_others_stay_as_stored(tmp_path, monkeypatch):
    made = []

    def measure(config):
        made.append(key_of(config.asdict()))
        return {"config": config.asdict(), "call": len(made)}

    monkeypatch.setattr(unadapted, "measure", measure)
    path = tmp_path / "unadapted.jsonl"
    main(path)
    before = path.read_text().splitlines()
    made.clear()
    main(path, "polypgen_minisam")
    after = path.read_text().splitlines()
    assert made == [("polypgen", "minisam", seed) for seed in range(6)]
    assert keys_of(after) == keys_of(before)
    assert [key for key, old, new in zip(keys_of(after), before, after, strict=True) if old != new] == made
    path.write_text("\n".join(before[:6]) + "\n")
    main(path, "polypgen_minisam")
    after = path.read_text().splitlines()
    assert after[:6] == before[:6] and keys_of(after[6:]) == made[:6], "what was not stored is not made"


def test_an_unknown_set_is_a_clear_error(tmp_path):
    with pytest.raises(FedloraError, match="Did you mean 'polypgen_minisam'"):
        main(tmp_path / "unadapted.jsonl", "polypgen_minisan")
