"""What the network engine promises without Flower: nothing imports it by the way, and the app that it writes."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedlora_mini
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import loopback, network
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.privacy import Release, epsilon

PACKAGE = Path(fedlora_mini.__file__).parent


def test_one_file_alone_imports_flower():
    """Other files may name its types for the type checker."""
    using = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        unused = {each for block in typing for each in ast.walk(block)}
        for node in set(ast.walk(tree)) - unused:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            using |= {path.name for name in names if name.split(".")[0] == "flwr"}
    assert using == {"flower.py"}


@pytest.mark.slow
def test_engines_and_runs_can_be_imported_without_flower():
    code = "import sys; sys.modules['flwr'] = None; import fedlora_mini.engines, fedlora_mini.engines.flower;"
    code += "import fedlora_mini.experiments.network, fedlora_mini.experiments.loopback"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_flower_the_network_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(loopback, "find_spec", lambda name: None)
    with pytest.raises(FedloraError, match=r"pip install 'fedlora_mini\[flower\]'"):
        loopback.Loopback(RunConfig(), tmp_path)


def test_a_config_passes_through_the_app_s_project_file(tmp_path):
    config = RunConfig(
        method="hetlora", data="spät/\"x\" \\ 'y'\n\U0001f642", ranks=[2, 4], data_options={"group": "^(\\d+)"}
    )
    app = loopback.write_app(tmp_path / "app", config=json.dumps(config.asdict()), folder="/tmp/ä b", timeout=2.5)
    flower = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert RunConfig(**json.loads(flower["config"]["config"])) == config
    assert (flower["config"]["folder"], flower["config"]["timeout"]) == ("/tmp/ä b", 2.5)
    program = ast.parse((app / "network_app.py").read_text(encoding="utf-8"))
    names = {node.targets[0].id for node in program.body if isinstance(node, ast.Assign)}
    assert set(flower["components"].values()) == {f"network_app:{name}" for name in names}


def test_ports_are_free_and_different():
    ports = loopback.free_ports(20)
    assert len(set(ports)) == 20 and not any(map(loopback._listens, ports))


def test_a_finished_run_is_not_overwritten_and_leakage_is_not_measured_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(loopback, "find_spec", lambda name: name)
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "start"}) + "\n" + json.dumps({"event": "result"}) + "\n")
    with pytest.raises(FedloraError, match="finished run"):
        loopback.Loopback(RunConfig(), tmp_path)
    with pytest.raises(FedloraError, match="leakage"):
        loopback.Loopback(RunConfig(leakage=True), tmp_path / "other")


def test_over_a_network_noise_that_the_server_can_make_again_is_refused_and_so_is_a_second_beginning(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loopback, "find_spec", lambda name: name)
    secure = RunConfig(sigma=1.0, secure=True)
    for unit in ("image", "client"):  # a client that knows the server's noise sees the others' mean without it
        seeded = RunConfig(sigma=1.0, unit=unit)
        with pytest.raises(FedloraError, match="add --secure"):
            loopback.Loopback(seeded, tmp_path)
        with pytest.raises(FedloraError, match="add --secure"):
            network.site(json.dumps(seeded.asdict()), 0)
        loopback.Loopback(secure.but(unit=unit), tmp_path)
    log = json.dumps({"event": "start"}) + "\n"  # before the first round is asked for, so that it may have been
    (tmp_path / "log.jsonl").write_text(log)
    loopback.Loopback(RunConfig(), tmp_path)
    with pytest.raises(FedloraError, match="no checkpoint"):
        loopback.Loopback(secure, tmp_path)
    with pytest.raises(FedloraError, match="no checkpoint"):
        network.serve(None, {"folder": str(tmp_path), "config": json.dumps(secure.asdict())})
    assert (tmp_path / "log.jsonl").read_text() == log


def test_the_servers_ledgers_keep_the_budget_of_a_node_that_forgets_what_it_released():
    """Client 1 releases, its answer is lost, and it comes back with an empty ledger: nobody but the server knows."""
    own = {"size": 32, "sites": "3", "rounds": 4, "steps": 2, "batch": 2, "threads": 1, "accountant": "rdp"}
    own |= {"data_options": {"per_site": 6, "val": 1, "test": 2}, "sigma": 1.0}
    two = 1.001 * epsilon([Release(1.0, 2 / 6, 4)], 1e-5, "rdp")
    config, released = RunConfig(method="fedit", epsilon=two, **own), []
    server = Federation.build(config)
    nodes = Federation.build(config).engine

    class Forgetful:
        clients = nodes.clients

        def exchange(self, requests):
            for update in nodes.exchange(requests):
                if update.client != 1:
                    yield update
            released.append(nodes.members[1].ledger.releases[-1].times)
            nodes.members[1].ledger = nodes.setting.guard.ledger()

    over = list(network.rounds(server, Forgetful(), {}))
    assert [each.refused for each in over] == [["client 1: no answer"]] * 2 and sum(released) == 4
    assert [member.ledger.releases[0].times for member in server.engine.members] == [4, 4, 4]
    assert server.promise.refuses(3).startswith("round 3 would spend")
