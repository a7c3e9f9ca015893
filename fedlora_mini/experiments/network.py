"""A run over a network: what its server does, and what each of its nodes has of it.

Every machine builds the run from the same `RunConfig`: data by name, model by seed. A node uses its own site's data
and the server none; only requests, updates and scores travel.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from fedlora_mini import state as S
from fedlora_mini.engines.flower import FlowerEngine, client_app, find, server_app
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.checkpoint import check_nothing_released, write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.provenance import machine, source_digest, versions, weights
from fedlora_mini.federation import federate
from fedlora_mini.federation.aggregation import AggregationError
from fedlora_mini.federation.exchange import OWN
from fedlora_mini.federation.loop import Engine, Round
from fedlora_mini.federation.member import Member
from fedlora_mini.state import State

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp


def check_noise(config: RunConfig) -> None:
    """Raise for private noise from the run's seed: all machines of a network are told it, and could take it off."""
    if config.private and config.sigma != 0 and not config.secure:
        raise FedloraError(
            "every machine of a network knows the run's seed, and with it the noise that clients or the server add, "
            "which it could take off again: add --secure, or simulate with `fedlora run`"
        )


def build(text: str) -> Federation:
    """The federation of a config in JSON. Its in-process clients stand at their start. Raises what `check_noise` does.

    So a node refuses, too, whoever wrote the config.
    """
    config = RunConfig(**json.loads(text))
    check_noise(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Federation.build(config)


@dataclass
class SiteOfRun:
    """One client of a run, with what it needs to score its own model."""

    federation: Federation
    member: Member

    def scores(self, state: State) -> dict[str, Any]:
        """Site -> the scores of this client's personal model on test data."""
        own, me = self.federation, self.member.number
        mine = tuple(site for k, site in enumerate(own.data.sites) if own.client_of(k) == me)
        own.engine.members = [self.member] * len(own.engine.members)  # the only one that this machine has
        own.server.state = state
        alone = replace(own, data=replace(own.data, sites=mine, unseen=()))
        return alone.evaluate("test", protocols=("personal",))["personal"]


def site(text: str, client: int) -> SiteOfRun:
    """Client `client` of a run, at its start."""
    federation = build(text)
    return SiteOfRun(federation, federation.engine.members[client])


def node_program() -> "ClientApp":
    """What runs on every node."""
    return client_app(site, source_digest())


def server_program() -> "ServerApp":
    """What runs beside the link that all nodes connect to. Run config: `config`, `folder`, `timeout`."""
    return server_app(serve)


def serve(grid: "Grid", settings: Mapping[str, Any]) -> None:
    """Lead a run; `log.jsonl` grows by one line a round, the last one is the result or the error.

    A private run begins once in a folder: the log of one that broke off stays, and with it what was released.
    """
    folder, lines = Path(settings["folder"]), []
    if RunConfig(**json.loads(settings["config"])).private:
        check_nothing_released(folder / "log.jsonl", "start")

    def note(record: dict[str, Any]) -> None:
        lines.append(json.dumps(record) + "\n")
        write_atomically(folder / "log.jsonl", "".join(lines))

    try:
        for record in lead(grid, settings["config"], settings["timeout"], folder):
            note(record)
    except FedloraError as error:
        note({"event": "error", "message": str(error)})
        raise


def rounds(federation: Federation, engine: Engine, asked: Mapping[int, list[int]]) -> Iterator[Round]:
    """The rounds of a run whose clients are where `engine` finds them. asked: round -> clients, else as configured.

    Under a budget the server keeps every ledger too, by what it asked for: an answer that was lost has cost as much.
    """
    config, server, local = federation.config, federation.server, federation.engine

    def meter(before: State) -> AggregationError:
        return AggregationError(federation.model, before, local.private)

    def choose(round: int) -> list[int]:
        return asked.get(round) or config.chosen(engine.clients, round)

    args = (local.method, engine, server, local.keys, config.rounds, config.steps, choose)
    for each in federation.within_budget(federate(*args, layers=local.setting.layers, meter=meter)):
        if engine is not local and (guard := local.setting.guard) is not None:
            for member in local.members:
                if member.ledger is not None and member.number in (each.clients or ()):
                    member.ledger.spend(guard.releases(config.steps))
        yield each


def lead(grid: "Grid", text: str, timeout: float, folder: Path) -> Iterator[dict[str, Any]]:
    """Find the nodes, federate, collect the scores: one record at the start, one a round, one for the result."""
    started = perf_counter()
    federation = build(text)
    server, local = federation.server, federation.engine
    nodes = find(grid, local.clients, source_digest(), timeout)
    engine = FlowerEngine(grid, nodes, timeout, local.device, local.untimed)
    made = {"versions": versions() | weights(federation.config.base), "machine": machine(local.device)}
    head = {"config": federation.config.asdict(), **made}
    yield {"event": "start", **head}
    took = []  # None where it would tell who was drawn
    for each in rounds(federation, engine, {}):
        took.append(each.seconds)
        yield {"event": "round", **asdict(each)}
    final = {name: value.cpu().clone().contiguous() for name, value in server.state.items()}
    (folder / "final.safetensors").write_bytes(save(final))
    scores = engine.scores(S.pick(server.state, lambda name: not name.startswith(OWN)), server.ranks)
    told = federation.promise.told(server.round)
    seconds, digest = None if None in took else perf_counter() - started, S.digest([server.state])
    result = {"scores": {"personal": scores}, **told, "seconds": seconds, "server_sha256": digest}
    yield {"event": "result", **head, **result}
