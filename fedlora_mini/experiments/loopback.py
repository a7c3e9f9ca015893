"""A federation of real processes on this machine: a SuperLink and one SuperNode per client, on 127.0.0.1 alone.

Each process has a folder of its own (log and Flower's home) below the run's. Nothing outside this machine is asked.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.run import dataset_of

HOST = "127.0.0.1"
START_SECONDS = 60.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": HOST, "no_proxy": HOST}

PROGRAM = '''from fedlora_mini.experiments.network import node_program, server_program

server = server_program()
client = node_program()
'''

PROJECT = """[project]
name = "fedlora-network"
version = "1.0.0"
description = "One federated run of fedlora_mini"
license = "MIT"

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "network_app:server"
clientapp = "network_app:client"

[tool.flwr.app.config]
"""


def write_app(folder: Path, /, **config: str | float) -> Path:
    """A Flower app that does one run; it can be sent to any SuperLink whose nodes have this package."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network_app.py").write_text(PROGRAM, encoding="utf-8")
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in config.items()]  # also TOML, as they are ASCII
    (folder / "pyproject.toml").write_text(PROJECT + "".join(lines), encoding="utf-8")
    return folder


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


class Loopback:
    """`with Loopback(config, folder) as network: for record in network.records(): …`. Ends its processes at the end."""

    def __init__(self, config: RunConfig, folder: Path, timeout: float = 600.0) -> None:
        if find_spec("flwr") is None:
            raise FedloraError("Flower is not installed here: pip install 'fedlora_mini[flower]'")
        if config.leakage:
            raise FedloraError("leakage is measured where all clients' memories are: use `fedlora run`")
        self.config, self.folder, self.timeout = config, folder.absolute(), timeout
        self.clients = 1 if config.row.pooled else len(dataset_of(config).sites)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Loopback":
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        port = free_port()
        own = ["--insecure", "--host", HOST, "--port", str(port), "--disable-runtime-dependency-installation"]
        self.link = self._start("superlink", ["flower-superlink", *own])
        until = monotonic() + START_SECONDS
        while not _listens(port):
            if self.link.poll() is not None or monotonic() > until:
                raise FedloraError(f"the SuperLink did not start; see {self.log('superlink')}")
            sleep(0.2)
        for k in range(self.clients):
            own = ["--insecure", "--superlink", f"{HOST}:{port}", "--host", HOST, "--port", str(free_port())]
            self.nodes.append(
                self._start(f"node{k}", ["flower-supernode", *own, "--node-config", f"partition-id={k}"])
            )
        app = write_app(
            self.folder / "app",
            config=json.dumps(self.config.asdict()),
            folder=str(self.folder),
            timeout=self.timeout,
        )
        (self.folder / "run").mkdir(exist_ok=True)
        (self.folder / "run/config.toml").write_text(
            f'[superlink.loopback]\naddress = "{HOST}:{port}"\ninsecure = true\n', encoding="utf-8"
        )
        self.run = self._start("run", ["flwr", "run", str(app), "loopback", "--stream"])

    def log(self, name: str) -> Path:
        """The output of one process: "superlink", "node0", …, "run"."""
        return self.folder / name / "log.txt"

    def _start(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        home, scripts = self.folder / name, Path(sys.executable).parent
        home.mkdir(parents=True, exist_ok=True)
        env = os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        command = [str(scripts / command[0]), *command[1:]]
        with self.log(name).open("wb") as log:
            # A session of its own, so that it and what it starts can be ended together.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        self.processes.append(process)
        return process

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of `log.jsonl` as they come, the result last. Raises if there is none."""
        seen = 0
        while True:
            over = self.run.poll() is not None or self.link.poll() is not None
            file = self.folder / "log.jsonl"
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            for line in lines[seen:]:
                record = json.loads(line)
                if record["event"] == "error":
                    raise FedloraError(f"{record['message']} (logs in {self.folder})")
                yield record
                if record["event"] == "result":
                    return
            seen = len(lines)
            if over:
                raise FedloraError(f"the run ended without a result; see {self.log('run')}")
            sleep(0.2)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            _end(process, signal.SIGTERM)
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            _end(process, signal.SIGKILL)
            process.wait()


def _end(process: "subprocess.Popen[bytes]", how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex((HOST, port)) == 0
