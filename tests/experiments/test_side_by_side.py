"""Runs over processes beside the same runs in one: the stored ones agree, and how a line of them is put together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import loopback, side_by_side
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.side_by_side import STORED, evidence, in_process, processor

FILE = Path(__file__).parents[2] / "results/network.jsonl"
LINES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
NAMES = [f"{r['config']['method']}{'-killed' if r['killed'] else ''}" for r in LINES]
SAME = ("loss", "bytes_up", "agg_err")

each_line = pytest.mark.parametrize("line", LINES, ids=NAMES)


def asked(line):
    return {t: clients for t, clients in enumerate(line["answered"], start=1)}


def test_the_stored_runs_are_the_ones_that_the_command_makes():
    assert [(RunConfig(**r["config"]), tuple(r["killed"]) if r["killed"] else None) for r in LINES] == STORED


@each_line
def test_a_stored_run_over_processes_has_the_bytes_of_the_one_in_process(line):
    here, there = line["in_process"], line["rounds"]
    assert len(line["server_sha256"]) == 64 and line["server_sha256"] == here["server_sha256"]
    assert len(there) == line["config"]["rounds"]
    for a, b in zip(there, here["rounds"], strict=True):
        assert [a[name] for name in SAME] == [b[name] for name in SAME]
    own = here["scores"]["personal"]
    assert line["scores"]["personal"] == {site: own[site] for site in line["scores"]["personal"]}
    assert {"torch", "flwr", "source", "python"} <= line["versions"].keys() and line["machine"]["processor"]


@each_line
def test_who_was_killed_is_who_did_not_answer(line):
    client, when = line["killed"] or (None, 1000)
    everybody = list(range(3))
    for r, answered in zip(line["rounds"], line["answered"], strict=True):
        gone = r["round"] >= when
        assert r["clients"] == everybody and answered == [k for k in everybody if not (gone and k == client)]
        assert len(r["refused"]) == gone and all(why.startswith(f"client {client}: no answer") for why in r["refused"])
    assert len(line["scores"]["personal"]) == len(line["answered"][-1])


@pytest.mark.slow
@each_line
def test_the_in_process_side_made_again_gives_the_stored_hash(line):
    """On the processor and torch that it was made with; elsewhere up to last bits, which training amplifies."""
    config = RunConfig(**line["config"])
    again = in_process(config, asked(line))
    same = processor() == line["machine"]["processor"] and torch.__version__ == line["versions"]["torch"]
    if same:
        assert again["server_sha256"] == line["server_sha256"]
    for new, old in zip(again["rounds"], line["rounds"], strict=True):
        assert new["bytes_up"] == old["bytes_up"]
        assert new["loss"] == pytest.approx(old["loss"], rel=0 if same else 0.02)


SMALL = RunConfig(method="iat", **side_by_side.TINY | {"rounds": 2, "steps": 1, "batch": 2})


@pytest.mark.slow
def test_asked_replaces_whom_the_config_would_ask_and_execution_is_one_by_one():
    torch.set_num_threads(1)
    federation = Federation.build(SMALL)
    whole = [vars(r) | {"seconds": 0} for r in federation.rounds()]
    everyone = in_process(SMALL.but(execution="grouped"), {})
    assert [r | {"seconds": 0} for r in everyone["rounds"]] == whole
    assert everyone["scores"]["personal"] == federation.evaluate(protocols=("personal",))["personal"]
    some = in_process(SMALL, {2: [0, 2]})
    assert [r["clients"] for r in some["rounds"]] == [[0, 1, 2], [0, 2]]
    assert some["server_sha256"] != everyone["server_sha256"]


class Scripted:
    """A network whose records are written in advance; it takes note of whom it was told to kill, and when."""

    clients = 3

    def __init__(self, records):
        self.script, self.sent, self.killed = records, 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def records(self):
        for record in self.script:
            self.sent += 1
            yield record

    def kill(self, client, round):
        self.killed.append((client, round, self.sent))


def test_a_line_says_who_answered_and_has_the_run_that_they_made(monkeypatch, tmp_path):
    def round_of(t, *lost):
        why = [f"client {k}: no answer" for k in lost]
        return {"event": "round", "round": t, "clients": [0, 1, 2], "refused": why}

    start = {"event": "start", "config": SMALL.asdict(), "versions": {}, "machine": {}}
    end = {"event": "result", "scores": {}, "seconds": 9.0, "server_sha256": "ab"}
    network = Scripted([start, round_of(1), round_of(2, 1), round_of(3, 1, 2), end])
    monkeypatch.setattr(side_by_side, "Loopback", lambda config, folder: network)
    monkeypatch.setattr(side_by_side, "version", lambda name: "1.41")
    monkeypatch.setattr(side_by_side, "message_seconds", lambda config: {"start": 1.5})
    monkeypatch.setattr(side_by_side, "in_process", lambda config, asked: asked)
    line = evidence(SMALL, tmp_path, killed=(1, 2))
    assert network.killed == [(1, 2, 2)], "once, after the start and round 1"
    assert line["answered"] == [[0, 1, 2], [0, 2], [0]] and line["killed"] == (1, 2)
    assert line["in_process"] == {1: [0, 1, 2], 2: [0, 2], 3: [0]}
    assert line["versions"]["flwr"] == "1.41" and line["message_seconds"] == {"start": 1.5}
    assert (line["server_sha256"], line["seconds"], len(line["rounds"])) == ("ab", 9.0, 3)


def test_a_node_is_killed_with_what_it_started_once_it_is_at_work(monkeypatch, tmp_path):
    monkeypatch.setattr(loopback, "find_spec", lambda name: name)
    network = loopback.Loopback(SMALL, tmp_path, timeout=0.2)
    network.log("node1").parent.mkdir()
    network.log("node1").write_text("[RUN 7, ROUND 1]\n")
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    node = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    network.processes["node1"] = node
    grandchild = int(node.stdout.readline())
    with pytest.raises(FedloraError, match="has not begun round 2"):
        network.kill(1, 2)
    assert node.poll() is None
    network.log("node1").write_text("[RUN 7, ROUND 1]\n[RUN 7, ROUND 2]\n")
    network.kill(1, 2)
    assert node.wait(5) == -9
    until = time.monotonic() + 5
    while alive(grandchild):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid):
    """Whether it runs; one that ended and that nobody has asked for is not alive."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
