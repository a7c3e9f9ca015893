"""A federation of real processes on this machine: a SuperLink and one SuperNode per client, on 127.0.0.1 alone.

Each process has a folder of its own (log and Flower's home) below the run's. Nothing outside this machine is asked.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.checkpoint import check_nothing_released
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import dataset_of
from fedlora_mini.experiments.network import check_noise
from fedlora_mini.experiments.run import Progress

HOST = "127.0.0.1"
START_SECONDS = 60.0
TIMEOUT = 600.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": HOST, "no_proxy": HOST}

PROGRAM = """from fedlora_mini.experiments.network import node_program, server_program

server = server_program()
client = node_program()
"""

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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


class Loopback:
    """`with Loopback(config, folder) as network: for record in network.records(): …`. Ends its processes at the end.

    timeout: seconds after which a node that does not answer is left out of a round.
    """

    def __init__(self, config: RunConfig, folder: Path, timeout: float = TIMEOUT) -> None:
        if find_spec("flwr") is None:
            raise FedloraError("Flower is not installed here: pip install 'fedlora_mini[flower]'")
        if config.leakage:
            raise FedloraError("leakage is measured where all clients' memories are: use `fedlora run`")
        check_noise(config)
        self.config, self.folder, self.timeout = config, folder.absolute(), timeout
        if self.records_file.exists() and '"event": "result"' in self.records_file.read_text(encoding="utf-8"):
            raise FedloraError(f"'{folder}' holds a finished run; choose another folder")
        if config.private:
            check_nothing_released(self.records_file, "start")
        self.clients = 1 if config.row.pooled else len(dataset_of(config).sites)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def records_file(self) -> Path:
        return self.folder / "log.jsonl"

    def log(self, name: str) -> Path:
        """The output of one process: "superlink", "node0", …, "run"."""
        return self.folder / name / "log.txt"

    def __enter__(self) -> "Loopback":
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        self.records_file.unlink(missing_ok=True)  # of a run that did not finish: there is no going on
        port, *own = free_ports(1 + self.clients)
        link = self._start("superlink", "flower-superlink", *at(port), "--disable-runtime-dependency-installation")
        until = monotonic() + START_SECONDS
        while not _listens(port):
            if link.poll() is not None or monotonic() > until:
                raise FedloraError(f"the SuperLink did not start; see {self.log('superlink')}")
            sleep(0.2)
        for k in range(self.clients):
            to = ["--superlink", f"{HOST}:{port}", "--node-config", f"partition-id={k}"]
            self._start(f"node{k}", "flower-supernode", *at(own[k]), *to)
        text = json.dumps(self.config.asdict())
        app = write_app(self.folder / "app", config=text, folder=str(self.folder), timeout=self.timeout)
        connection = f'[superlink.loopback]\naddress = "{HOST}:{port}"\ninsecure = true\n'
        (self.folder / "run").mkdir(exist_ok=True)
        (self.folder / "run/config.toml").write_text(connection, encoding="utf-8")
        self._start("run", "flwr", "run", str(app), "loopback", "--stream")

    def _start(self, name: str, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """A process with a home and a session of its own, so that it can be ended with what it starts."""
        home, scripts = self.folder / name, Path(sys.executable).parent
        home.mkdir(parents=True, exist_ok=True)
        env = os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(scripts / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        return self.processes[name]

    def kill(self, client: int, round: int) -> None:
        """End a client's node, and all that it started, without warning, once it works on that round."""
        node, until = f"node{client}", monotonic() + self.timeout
        while f"ROUND {round}]" not in self.log(node).read_text(encoding="utf-8"):
            if monotonic() > until:
                raise FedloraError(f"'{node}' has not begun round {round}; see {self.log(node)}")
            sleep(0.05)
        _end(self.processes[node], signal.SIGKILL)

    def records(self) -> Iterator[dict[str, Any]]:
        """The start, every round and the result, as they come. Raises if the run ends without a result."""
        seen = 0
        while True:
            over = any(self.processes[name].poll() is not None for name in ("run", "superlink"))
            file = self.records_file
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            for record in map(json.loads, lines[seen:]):
                if record["event"] == "error":
                    raise FedloraError(f"{record['message']} (logs: {self.folder})")
                yield record
                if record["event"] == "result":
                    return
            if over:
                raise FedloraError(f"the run ended without a result; see {self.log('run')}")
            seen = len(lines)
            sleep(0.2)

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            _end(process, signal.SIGTERM)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            _end(process, signal.SIGKILL)
            process.wait()


def run_loopback(
    config: RunConfig, folder: Path, progress: Progress = lambda record: None, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """Run to the end and return the result; `progress` gets every round's record."""
    result: dict[str, Any] = {}
    with Loopback(config, folder, timeout) as network:
        for result in network.records():
            if result["event"] == "round":
                progress(result)
    return result


def at(port: int) -> list[str]:
    """Where a process listens: on this machine alone, so without TLS."""
    return ["--insecure", "--host", HOST, "--port", str(port)]


def _end(process: "subprocess.Popen[bytes]", how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex((HOST, port)) == 0
