"""Clients on other machines: Flower carries each request to its node and each update back, bit for bit.

The only file that knows flwr. A node's private memory lives in Flower's context of that node; what it sends is what
`Member.answer` hands out.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load, save

from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.aggregation.padded import truncate
from fedlora_mini.federation.exchange import Request, Update
from fedlora_mini.federation.member import Member
from fedlora_mini.privacy import Ledger
from fedlora_mini.state import State

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

CLIENT = "partition-id"  # the setting of a node that says which client it is; Flower's own node ids are random
NOTES = "notes"
PAUSE = 0.5  # seconds between two looks for an answer


def pack(state: State, **notes: Any) -> "RecordDict":
    """A state as safetensors bytes, every dtype and bit kept, and its names in their order; with plain values."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    data = save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    record = ArrayRecord({"state": Array("uint8", (len(data),), "safetensors", data)})
    return RecordDict({"state": record, NOTES: ConfigRecord({"names": list(state), **notes})})


def unpack(content: "RecordDict", device: torch.device) -> State:
    """The opposite of `pack`, on `device`."""
    tensors = load(content["state"]["state"].data)
    return {name: tensors[name].to(device) for name in content[NOTES]["names"]}


class FlowerEngine:
    """`nodes[k]` is the Flower id of client k's node; one that has not answered after `timeout` seconds is left out.

    untimed: the seconds of a round are not told, see `LocalEngine.untimed`.
    """

    def __init__(
        self, grid: "Grid", nodes: Mapping[int, int], timeout: float, device: torch.device, untimed: bool = False
    ) -> None:
        self.grid, self.nodes, self.timeout, self.device, self.untimed = grid, nodes, timeout, device, untimed
        self.heard = dict.fromkeys(nodes, 0)  # client -> the last round whose update arrived
        self.reasons: dict[int, str] = {}  # client -> what its node said in the place of its last answer

    @property
    def clients(self) -> list[int]:
        return sorted(self.nodes)

    def exchange(self, requests: dict[int, Request]) -> Iterator[Update]:
        """The updates of the nodes that answered, in the order of clients."""
        contents = {k: pack(r.state, round=r.round, heard=self.heard[k]) for k, r in requests.items()}
        for client, content in self._ask("train", contents):
            self.heard[client] = requests[client].round
            notes = content[NOTES]
            told = (notes[name] for name in ("weight", "loss", "steps", "broken"))
            yield Update(client, unpack(content, self.device), *told)

    def scores(self, state: State, ranks: Mapping[int, int]) -> dict[str, Any]:
        """Site -> the scores of its personal model, taken where its private part is; `state` is the server's.

        ranks: of clients that adapt with another rank than the server. Without a site whose node does not answer;
        raises if none does.
        """
        fitted = {client: truncate(state, ranks[client]) if client in ranks else state for client in self.clients}
        contents = {client: pack(own, heard=self.heard[client]) for client, own in fitted.items()}
        replies = [json.loads(content[NOTES]["scores"]) for _, content in self._ask("evaluate", contents)]
        if not replies:
            told = "; ".join(sorted(set(self.reasons.values()))) or "no node answered"
            raise FedloraError(f"no personal model could be scored: {told}")
        return {name: scores for reply in replies for name, scores in reply.items()}

    def _ask(self, kind: str, contents: "Mapping[int, RecordDict]") -> "Iterator[tuple[int, RecordDict]]":
        """(client, answer) in the order of clients, each fetched when its turn comes: the server holds one of them.

        What has arrived before its turn waits at the SuperLink.
        """
        from flwr.app import Message

        messages = [
            Message(content, self.nodes[client], kind, group_id=str(content[NOTES].get("round", "")))
            for client, content in contents.items()
        ]
        until = monotonic() + self.timeout
        numbers = list(self.grid.push_messages(messages))
        if len(numbers) < len(messages):
            raise FedloraError(f"the SuperLink took none of the {len(messages)} messages: its log says why")
        for client, number in sorted(zip(contents, numbers, strict=True)):
            reply = self._reply(number, until) if number else None
            self.reasons.pop(client, None)
            if reply is not None and reply.has_error():
                self.reasons[client] = reply.error.reason.strip().partition("\n")[0]
            elif reply is not None:
                yield client, reply.content

    def _reply(self, number: str, until: float) -> "Message | None":
        """The answer to that message; past `until` only if it is there already."""
        while True:
            if found := list(self.grid.pull_messages([number])):
                return found[0]
            if monotonic() > until:
                return None
            sleep(PAUSE)


def find(grid: "Grid", clients: Sequence[int], code: str, timeout: float) -> dict[int, int]:
    """Client -> node, once every client has one. `code`: a digest that the nodes must share with the server."""
    from flwr.app import ConfigRecord, Message, RecordDict

    found: dict[int, int] = {}
    asked: set[int] = set()
    until = monotonic() + timeout
    while missing := sorted(set(clients) - found.keys()):
        if monotonic() > until:
            raise FedloraError(f"clients {missing} have no node after {timeout:g} s; a node says '{CLIENT}=<client>'")
        new = sorted(set(grid.get_node_ids()) - asked)
        asked |= set(new)
        hello = RecordDict({NOTES: ConfigRecord({"code": code})})
        replies = grid.send_and_receive([Message(hello, node, "query") for node in new], timeout=timeout) if new else []
        for reply in replies:
            if reply.has_error():
                raise FedloraError(f"a node cannot take part: {reply.error.reason}")
            client = reply.content[NOTES]["client"]
            if client in found:
                raise FedloraError(f"two nodes say that they are client {client}")
            found[client] = reply.metadata.src_node_id
        sleep(0 if new else PAUSE)
    return {client: found[client] for client in clients}


class Site(Protocol):
    """What a node needs of a run: its member, and how to score the personal model that it has under a server state."""

    member: Member

    def scores(self, state: State) -> dict[str, Any]: ...


def client_app(site: Callable[[str, int], Site], code: str) -> "ClientApp":
    """The program of a node. `site(config, client)` builds its part of a run; `code` is the digest of its sources."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def here(message: "Message", context: "Context") -> Site:
        """The site as it stood after its last answer. Raises if the server has heard a later one.

        An answer that the server has not heard may be forgotten with the memory, and what it released with the ledger:
        this ledger alone keeps no budget. The server's does, which counts what it asked for, answered or not, before it
        asks again (`experiments.network.rounds`); a server that breaks off in a round begins no second time in its
        folder (`experiments.network.serve`).
        """
        own = site(context.run_config["config"], context.node_config[CLIENT])
        notes = context.state.get(NOTES, {})
        kept = notes.get("round", 0)
        if kept:
            own.member.memory = unpack(context.state, own.member.data.images.device)
            own.member.ledger = Ledger.fromdict(json.loads(notes["ledger"])) if own.member.ledger else None
        if kept < (heard := message.content[NOTES]["heard"]):
            raise FedloraError(f"client {own.member.number} lost its memory: it is of round {kept}, not {heard}")
        return own

    @app.query()
    def introduce(message: "Message", context: "Context") -> "Message":
        theirs = message.content[NOTES]["code"]
        if theirs != code:
            raise FedloraError(f"client {context.node_config[CLIENT]} has other code: {code}, the server {theirs}")
        return Message(RecordDict({NOTES: ConfigRecord({"client": context.node_config[CLIENT]})}), reply_to=message)

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        member = here(message, context).member
        round = message.content[NOTES]["round"]
        update = member.answer(Request(round, unpack(message.content, member.data.images.device)))
        context.state = pack(member.memory, round=round, ledger=json.dumps(member.ledger and member.ledger.asdict()))
        content = pack(update.state, weight=update.weight, loss=update.loss, steps=update.steps, broken=update.broken)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: "Message", context: "Context") -> "Message":
        own = here(message, context)
        scores = own.scores(unpack(message.content, own.member.data.images.device))
        return Message(RecordDict({NOTES: ConfigRecord({"scores": json.dumps(scores)})}), reply_to=message)

    return app


def server_app(serve: Callable[["Grid", Mapping[str, Any]], None]) -> "ServerApp":
    """The program of the server: `serve(grid, run config)`."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        serve(grid, context.run_config)

    return app
