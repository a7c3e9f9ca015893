"""A run that was stopped: it goes on to the same bytes, and a folder of another run is left as it is."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.run import run
from fedlora_mini.federation import METHODS

TINY = {"sites": "2", "size": 32, "rounds": 3, "steps": 2, "batch": 2, "rank": 2, "threads": 1}
TINY |= {"data_options": {"per_site": 6, "val": 2, "test": 3}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"method": "fedsa", "fraction": 0.5}, {"method": "flora", "ranks": (1, 2)}])
def test_stopping_after_any_round_and_going_on_changes_nothing(tmp_path, own):
    config = RunConfig(**own, **TINY)
    whole = run(config, tmp_path / "whole")

    class Stop(Exception):
        pass

    for last in (1, 2, 3):
        folder = tmp_path / f"after{last}"

        def stop(record, last=last):
            if record["round"] == last:
                raise Stop

        with pytest.raises(Stop):
            run(config, folder, stop)
        assert run(config, folder)["final_sha256"] == whole["final_sha256"]
        for key in ("bytes_up", "bytes_down", "loss", "scores"):
            assert json.loads((folder / "result.json").read_text())[key] == whole[key]


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bytes(tmp_path):
    arguments = ["run", "iat", "--sites", "2", "--size", "32", "--rounds", "12", "--steps", "4", "--batch", "2"]
    arguments += ["--threads", "1", "--option", "per_site=8", "--option", "test=3", "--option", "val=2"]

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "fedlora_mini.cli", *arguments, "--out", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    whole = (tmp_path / "whole/final.safetensors").read_bytes()
    for seed in range(2):
        folder = tmp_path / f"killed{seed}"
        process = start(folder)
        wanted = random.Random(seed).randint(1, 9)
        while process.poll() is None:
            log = folder / "log.jsonl"
            if log.exists() and log.read_text().count('"event": "round"') >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
        assert not (folder / "result.json").exists(), "it finished before it was killed"
        assert start(folder).wait() == 0
        assert (folder / "final.safetensors").read_bytes() == whole


def test_a_run_that_went_on_counts_all_its_seconds(tmp_path):
    """More than the second process took by itself."""

    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt
        time.sleep(0.5)

    config = RunConfig(method="fedit", **TINY)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, stop)
    began = time.perf_counter()
    result = run(config, tmp_path)
    assert len(result["round_seconds"]) == 3 and result["seconds"] > time.perf_counter() - began


def begin(config, folder, data=None):
    """Stop the run after its first round."""

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, stop, data)


def test_a_begun_run_of_other_settings_is_told_by_what_it_was(tmp_path):
    """Also where its tensors would not fit, and a private one stays one that released something."""
    begin(RunConfig(method="fedit", sigma=1.0, **TINY), tmp_path)
    with pytest.raises(FedloraError, match=r"another run's checkpoint; .* stays released"):
        run(RunConfig(method="fedit", **TINY | {"sites": "3"}), tmp_path)


OTHER = {
    "images": (lambda data: replace(data, sites=data.sites[::-1]), "other images"),
    "row": (lambda data: data, "another row of that name"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_folder_is_not_taken_up_by_other_images_or_another_row_of_its_name(what, tmp_path, monkeypatch):
    """Neither where the run has ended, nor where it was stopped; its own images and row are welcome in both."""
    change, told = OTHER[what]
    config = RunConfig(method="fedit", **TINY)
    data = dataset_of(config)
    ended, begun = tmp_path / "ended", tmp_path / "begun"
    result = run(config, ended, data=data)
    begin(config, begun, data)
    if what == "row":
        monkeypatch.setitem(METHODS, "fedit", replace(METHODS["fedit"], schedule=METHODS["rolora"].schedule))
    for folder in (ended, begun):
        with pytest.raises(FedloraError, match=f"'{folder}' .* {told}"):
            run(config, folder, data=change(data))
    with pytest.raises(FedloraError, match=told):
        Federation.finished(ended, change(data))
    monkeypatch.undo()
    assert run(config, ended, data=lambda: data) == result
    assert run(config, begun, data=data)["final_sha256"] == result["final_sha256"]


def test_the_record_of_a_private_run_has_no_digest_of_its_images(tmp_path):
    """Who guesses them all could confirm it."""
    kept = run(RunConfig(method="fedit", sigma=1.0, **TINY), tmp_path)["versions"]
    assert "data" not in kept and "row" in kept


def test_a_checkpoint_of_another_run_is_not_called_damaged(tmp_path):
    config = RunConfig(method="fedit", **TINY)
    begin(config, tmp_path)
    with pytest.raises(FedloraError) as told:
        run(config.but(rounds=4), tmp_path)
    assert "damaged" not in str(told.value) and str(told.value).count("choose another folder") == 1


def test_a_record_of_another_version_is_one_clear_error(tmp_path):
    config = RunConfig(method="fedit", **TINY | {"rounds": 0})
    run(config, tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(record | {"config": record["config"] | {"later": 1}}))
    for act in (lambda: run(config, tmp_path), lambda: Federation.finished(tmp_path)):
        with pytest.raises(FedloraError, match="unknown setting 'later'"):
            act()


def test_a_folder_of_another_run_is_not_overwritten(tmp_path):
    config = RunConfig(method="fedit", **TINY)
    begin(config, tmp_path)
    with pytest.raises(FedloraError, match="another run"):
        run(config.but(seed=1), tmp_path)
