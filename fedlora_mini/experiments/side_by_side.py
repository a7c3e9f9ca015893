"""A run over processes beside the same run in this one: the lines of `results/network.jsonl`.

`python -m fedlora_mini.experiments.side_by_side results/network.jsonl` makes the stored runs again, which needs Flower.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from fedlora_mini import state as S
from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.lines import records_file
from fedlora_mini.experiments.loopback import Loopback
from fedlora_mini.experiments.network import build, rounds

TINY: dict[str, Any] = {"sites": "3", "size": 32, "rounds": 3, "steps": 8, "batch": 4, "threads": 1}
TINY |= {"execution": "sequential", "data_options": {"per_site": 12, "val": 4, "test": 8, "appearance": 1.0}}
STORED = [  # (run, (client, round) whose node is killed)
    (RunConfig(method="fedit", **TINY), None),
    (RunConfig(method="iat", **TINY), None),
    (RunConfig(method="hetlora", ranks=[2, 4, 3], **TINY), None),
    (RunConfig(method="iat", **TINY), (1, 2)),
]

PROBE = """import json, sys
from time import process_time
from fedlora_mini.experiments.network import node_program, site
from fedlora_mini.federation import Request

node_program()
at = [0, process_time()]
own = site(sys.argv[1], 0)
at.append(process_time())
for round in (1, 2):
    own.member.answer(Request(round, {}))
    at.append(process_time())
print(json.dumps(at))
"""


def processor() -> str:
    """What the last bits of a sum depend on beside the libraries: "AMD EPYC, family 26, model 2, AVX512".

    A name alone may stand for several generations.
    """
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = [found.get("model name", platform.machine())]
    parts += [f"{name.removeprefix('cpu ')} {found[name]}" for name in ("cpu family", "model") if name in found]
    return ", ".join([*parts, torch.backends.cpu.get_cpu_capability()])


def in_process(config: RunConfig, asked: Mapping[int, list[int]]) -> dict[str, Any]:
    """The run in this process, one client after the other. asked: round -> clients, else as configured."""
    started = perf_counter()
    federation = build(json.dumps(config.but(execution="sequential").asdict()))  # several in one pass round otherwise
    own = [asdict(each) for each in rounds(federation, federation.engine, asked)]
    scores = federation.evaluate("test", protocols=("personal",))
    seconds, digest = perf_counter() - started, S.digest([federation.server.state])
    return {"rounds": own, "scores": scores, "seconds": seconds, "server_sha256": digest}


def message_seconds(config: RunConfig) -> dict[str, float]:
    """CPU seconds of one message in a process of its own, without Flower's errands.

    loading: what libraries load at first use, the difference between a first and a second round of training.
    """
    command = [sys.executable, "-c", PROBE, json.dumps(config.asdict())]
    at = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    start, site, first, training = (end - begin for begin, end in pairwise(at))
    return {"start": start, "site": site, "loading": first - training, "training": training}


def evidence(config: RunConfig, folder: Path, killed: tuple[int, int] | None = None) -> dict[str, Any]:
    """One stored line: a run over processes, and in this one without those that did not answer.

    killed: (client, round), the node is killed while its client works on that round.
    """
    records, load = [], os.getloadavg()[0]
    with Loopback(config, folder) as network:
        for record in network.records():
            records.append(record)
            if killed is not None and len(records) == killed[1]:  # the start and the rounds before that one
                network.kill(*killed)
    start, *over, result = records
    silent = {r["round"]: {int(re.findall(r"\d+", line)[0]) for line in r["refused"]} for r in over}
    asked = {r["round"]: [k for k in r["clients"] if k not in silent[r["round"]]] for r in over}
    return {
        "event": "network",
        "config": start["config"],
        "versions": start["versions"] | {"flwr": version("flwr")},
        "machine": start["machine"] | {"processor": processor(), "load": load},  # of the minute before
        "killed": killed,
        "answered": list(asked.values()),
        **{name: result[name] for name in ("scores", "seconds", "server_sha256")},
        "rounds": over,
        "message_seconds": message_seconds(config),
        "in_process": in_process(config, asked),
    }


def main(path: Path) -> None:
    """Make the stored runs again."""
    with TemporaryDirectory() as folder:
        lines = [json.dumps(evidence(c, Path(folder) / str(k), killed)) for k, (c, killed) in enumerate(STORED)]
    write_atomically(path, "".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(records_file())
