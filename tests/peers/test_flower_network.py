"""A federation of real processes on 127.0.0.1: the bytes of the in-process run, and a node that dies in mid-round."""

import time

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.peers, pytest.mark.slow]
pytest.importorskip("flwr", reason="flwr is not installed here: run `make peers`")

from fedlora_mini import state as S  # noqa: E402
from fedlora_mini.experiments.config import RunConfig  # noqa: E402
from fedlora_mini.experiments.federation import Federation  # noqa: E402
from fedlora_mini.experiments.loopback import Loopback  # noqa: E402
from fedlora_mini.federation import federate  # noqa: E402

TINY = {"sites": "3", "size": 32, "rounds": 2, "steps": 2, "batch": 2, "rank": 2, "threads": 1}
TINY |= {"execution": "sequential", "data_options": {"per_site": 4, "val": 2, "test": 2}}


def wait_for(file, text, seconds=120):
    until = time.monotonic() + seconds
    while text not in file.read_text():
        assert time.monotonic() < until, f"no '{text}' in {file}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "settings", [{"method": "fedit"}, {"method": "hetlora", "ranks": (1, 2)}], ids=["fedit", "hetlora"]
)
def test_the_network_ends_with_the_bytes_of_the_same_run_in_process(tmp_path, settings):
    config = RunConfig(**TINY | settings | {"sites": "2"})
    with Loopback(config, tmp_path) as network:
        *_, result = network.records()
    torch.set_num_threads(1)
    federation = Federation.build(config)
    list(federation.rounds())
    assert S.digest(load_file(tmp_path / "final.safetensors")) == S.digest(federation.server.state)
    assert result["server_sha256"] == S.digest(federation.server.state)


def test_the_network_ends_with_the_in_process_bytes_though_a_node_is_killed_in_mid_round(tmp_path):
    """Round 1 with three nodes; the second node is killed in round 2, in which the others use their private factors."""
    config = RunConfig(method="iat", **TINY)
    records = []
    with Loopback(config, tmp_path) as network:
        for record in network.records():
            records.append(record)
            if record.get("round") == 1:
                wait_for(network.log("node1"), "ROUND 2]")
                network.processes["node1"].kill()
    assert all(process.poll() is not None for process in network.processes.values())
    start, first, second, result = records
    [why] = second["refused"]  # and what the link says of the node, if it has seen by then that it is gone
    assert (start["event"], first["refused"]) == ("start", []) and why.startswith("client 1: no answer")
    assert list(result["scores"]["personal"]) == ["site1", "site3"]

    torch.set_num_threads(1)
    federation = Federation.build(config)
    engine, server = federation.engine, federation.server
    answering = {1: [0, 1, 2], 2: [0, 2]}
    layers = engine.setting.layers
    list(federate(engine.method, engine, server, engine.keys, 2, config.steps, answering.get, layers=layers))
    assert S.digest(load_file(tmp_path / "final.safetensors")) == S.digest(server.state) == result["server_sha256"]
