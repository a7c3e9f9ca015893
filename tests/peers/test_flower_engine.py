"""The network engine without a network: every message and every node's context goes through Flower's own bytes."""

import json
from functools import cache
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.peers
pytest.importorskip("flwr", reason="flwr is not installed here: run `make peers`")

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.common.serde import context_from_proto, context_to_proto  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedlora_mini import state as S  # noqa: E402
from fedlora_mini.data import load  # noqa: E402
from fedlora_mini.engines.flower import FlowerEngine, client_app, find, pack, unpack  # noqa: E402
from fedlora_mini.errors import FedloraError  # noqa: E402
from fedlora_mini.experiments import network  # noqa: E402
from fedlora_mini.experiments.config import RunConfig  # noqa: E402
from fedlora_mini.experiments.federation import Federation  # noqa: E402
from fedlora_mini.experiments.network import lead, node_program, site  # noqa: E402
from fedlora_mini.experiments.provenance import source_digest  # noqa: E402
from fedlora_mini.federation import METHODS, Request, federate  # noqa: E402
from fedlora_mini.federation.member import Member  # noqa: E402

TINY = {"rounds": 3, "steps": 2, "batch": 2, "rank": 4, "threads": 1, "base": "none", "execution": "sequential"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """One thread, Flower's idea of who is running, and data that are made once."""
    torch.set_num_threads(1)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("fedlora_mini.experiments.federation.dataset_of", lambda config: phantom())


@cache
def phantom():
    return load("phantom", size=32, sites=3, unseen=0, per_site=4, val=2, test=2)


def sent(message):
    """The message at the other end, from the objects that Flower sends."""
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    arrived.metadata.__dict__["_message_id"] = message.object_id
    return arrived


def stored(context):
    """The context after it was written as Flower writes it."""
    written = context_to_proto(context)
    return context_from_proto(type(written).FromString(written.SerializeToString()))


def node_id(client):
    """Large as Flower's are, and not in the order of clients."""
    return 2**63 - client


class Wire:
    """A grid whose nodes run here, one call after the other; their ids and the order of replies say nothing."""

    def __init__(self, config, clients, app=None):
        self.app = node_program() if app is None else app
        settings = {"config": json.dumps(config.asdict())}
        self.nodes = {node_id(k): Context(1, 1, {"partition-id": k}, RecordDict(), settings) for k in clients}
        self.lost = lambda client, kind, round: False  # whether a message finds its node dead
        self.replies, self.waiting, self.count = [], {}, count()

    def get_node_ids(self):
        return list(self.nodes)

    def context(self, client):
        return next(c for c in self.nodes.values() if c.node_config["partition-id"] == client)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            node, about = message.metadata.dst_node_id, message.metadata
            numbers.append(f"message {next(self.count)}")
            if self.lost(self.nodes[node].node_config["partition-id"], about.message_type, about.group_id):
                continue
            context = stored(self.nodes[node])
            arrived = sent(message)
            try:
                reply = self.app(arrived, context)
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=arrived)
            self.nodes[node] = stored(context)
            self.waiting[numbers[-1]] = sent(reply)
            self.replies.append(self.waiting[numbers[-1]])
        return numbers

    def pull_messages(self, numbers):
        found = [self.waiting.pop(number) for number in numbers if number in self.waiting]
        return sorted(found, key=lambda reply: reply.object_id)

    def send_and_receive(self, messages, *, timeout):
        return self.pull_messages(self.push_messages(messages))


def over_the_wire(config, folder, wire=None):
    """(records of the run, the server's final state, the wire). An answer is there at once, or is lost."""
    wire = Wire(config, range(3)) if wire is None else wire
    records = list(lead(wire, json.dumps(config.asdict()), 0.2, folder))
    return records, load_file(folder / "final.safetensors"), wire


def in_process(config, choose=None):
    """(rounds, the federation after them)."""
    federation = Federation.build(config)
    if choose is None:
        return list(federation.rounds()), federation
    engine = federation.engine
    args = (engine.method, engine, federation.server, engine.keys, config.rounds, config.steps, choose)
    return list(federate(*args, layers=engine.setting.layers)), federation


@pytest.mark.parametrize("name", METHODS)
def test_a_row_ends_with_the_bytes_of_the_in_process_run(tmp_path, name):
    """The server's state and every client's memory; losses, bytes and errors of all rounds; the scores."""
    ranks = {"ranks": [2, 4, 3]} if name in ("hetlora", "flora") else {}
    config = RunConfig(method=name, **TINY, **ranks)
    rounds, local = in_process(config)
    records, final, wire = over_the_wire(config, tmp_path)
    assert S.digest(final) == S.digest(local.server.state)
    for client, memory in local.engine.memory.items():
        there = unpack(wire.context(client).state, CPU)
        assert S.digest(there) == S.digest(memory) and list(there) == list(memory)
    for here, there in zip(rounds, records[1:-1], strict=True):
        for value in ("loss", "bytes_up", "bytes_down", "agg_err", "refused"):
            assert there[value] == getattr(here, value)
    assert records[-1]["scores"]["personal"] == local.evaluate(protocols=("personal",))["personal"]


def test_a_private_tensor_never_leaves_its_node(tmp_path):
    config = RunConfig(method="iat", **TINY)
    _, _, wire = over_the_wire(config, tmp_path)
    federation = Federation.build(config)
    private = {name for name in federation.server.state if federation.engine.private(name)}
    answers = [reply.content for reply in wire.replies if reply.metadata.message_type == "train"]
    travelled = {name for content in answers for name in unpack(content, CPU)}
    assert len(answers) == 9 and private and travelled and not private & travelled
    assert private < unpack(wire.context(0).state, CPU).keys()


def test_every_dtype_and_bit_and_the_order_survive():
    one = torch.tensor([1.0, -0.0, float("inf")])
    state = {
        "z": torch.tensor([True, False]),
        "b": torch.tensor([[0, 255]], dtype=torch.uint8),
        "nan": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
        "half": one.bfloat16(),
        "double": one.double() / 3,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "a": torch.arange(6.0).view(2, 3).T,
        "part": one[:1],
        "same": one,
    }
    content = sent(Message(pack(state, round=3, loss=0.1), 1, "train")).content
    back = unpack(content, CPU)
    assert list(back) == list(state) and S.digest(back) == S.digest(state)
    assert content["notes"]["round"] == 3 and content["notes"]["loss"] == 0.1
    assert unpack(sent(Message(pack({}), 1, "train")).content, CPU) == {}


def test_a_node_that_does_not_answer_is_left_out_of_the_round(tmp_path):
    """The end is that of an in-process run in which client 1 takes part in the first round alone."""
    config = RunConfig(method="iat", **TINY)
    wire = Wire(config, range(3))
    wire.lost = lambda client, kind, round: client == 1 and kind != "query" and round != "1"
    records, final, _ = over_the_wire(config, tmp_path, wire)
    assert [r["refused"] for r in records[1:-1]] == [[], *[["client 1: no answer"]] * 2]
    assert list(records[-1]["scores"]["personal"]) == ["site1", "site3"]
    _, local = in_process(config, lambda round: [0, 1, 2] if round == 1 else [0, 2])
    assert S.digest(final) == S.digest(local.server.state)


def test_the_server_fetches_an_answer_when_its_turn_comes():
    """Not all at once: of a thousand nodes' tensors it holds one node's."""
    config = RunConfig(method="fedit", **TINY)
    wire, server = Wire(config, range(3)), Federation.build(config).server
    engine = FlowerEngine(wire, {k: node_id(k) for k in (2, 0, 1)}, 60.0, CPU)
    left = []
    for update in engine.exchange({k: Request(1, server.state) for k in (2, 0, 1)}):
        left.append((update.client, len(wire.waiting)))
    assert left == [(0, 2), (1, 1), (2, 0)]


def test_a_late_answer_is_waited_for_and_one_that_never_comes_costs_the_others_nothing(monkeypatch):
    config = RunConfig(method="fedit", **TINY)
    wire, server = Wire(config, range(3)), Federation.build(config).server
    pull, looks = wire.pull_messages, []

    def late(numbers):
        looks.append(numbers[0])
        return [] if looks.count(numbers[0]) < 3 else pull(numbers)  # there at the third look

    monkeypatch.setattr(wire, "pull_messages", late)
    monkeypatch.setattr("fedlora_mini.engines.flower.PAUSE", 0.01)
    engine = FlowerEngine(wire, {k: node_id(k) for k in range(3)}, 60.0, CPU)
    requests = {k: Request(1, server.state) for k in range(3)}
    assert [update.client for update in engine.exchange(requests)] == [0, 1, 2] and len(looks) == 9
    wire.pull_messages, wire.lost = pull, lambda client, kind, round: client == 0
    engine.timeout = 0.05
    assert [update.client for update in engine.exchange(requests)] == [1, 2]


def test_without_any_score_a_run_has_no_end(monkeypatch):
    config = RunConfig(method="fedit", **TINY)
    wire, server = Wire(config, range(3)), Federation.build(config).server
    engine = FlowerEngine(wire, {k: node_id(k) for k in range(3)}, 0.05, CPU)
    with pytest.raises(FedloraError, match=r"no personal model could be scored: .*lost its memory"):
        engine.heard = dict.fromkeys(engine.heard, 7)
        engine.scores(server.state, {})
    wire.lost = lambda client, kind, round: True
    with pytest.raises(FedloraError, match="no node answered"):
        engine.scores(server.state, {})


def test_messages_that_the_link_does_not_take_are_an_error(monkeypatch):
    config = RunConfig(method="fedit", **TINY)
    wire = Wire(config, range(3))
    monkeypatch.setattr(wire, "push_messages", lambda messages: [])
    engine = FlowerEngine(wire, {k: node_id(k) for k in range(3)}, 60.0, CPU)
    with pytest.raises(FedloraError, match="took none of the 3 messages"):
        list(engine.exchange({k: Request(1, {}) for k in range(3)}))


def test_an_error_on_a_node_is_no_answer_and_a_round_without_answers_ends_the_run(tmp_path, monkeypatch):
    answer = Member.answer

    def break_down(self, request):
        return 1 / 0 if self.number == 1 or request.round == 2 else answer(self, request)

    monkeypatch.setattr(Member, "answer", break_down)
    config = RunConfig(method="fedit", **TINY)
    settings = {"config": json.dumps(config.asdict()), "folder": str(tmp_path), "timeout": 60.0}
    with pytest.raises(FedloraError, match=r"round 2: no usable update"):
        network.serve(Wire(config, range(3)), settings)
    start, first, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert start["event"] == "start" and first["refused"] == ["client 1: no answer (division by zero)"]
    told = "; ".join(f"client {k}: no answer (division by zero)" for k in (0, 1))
    assert last["event"] == "error" and told in last["message"]


def test_a_node_without_its_memory_is_refused_instead_of_starting_again(tmp_path):
    config = RunConfig(method="fedsa", **TINY)
    wire = Wire(config, range(3))
    records = []
    for record in lead(wire, json.dumps(config.asdict()), 60.0, tmp_path):
        records.append(record)
        if record.get("round") == 1:
            wire.context(1).state = RecordDict()
    first, *others = [r["refused"] for r in records[1:-1]]
    assert not first and all(each[0].startswith("client 1: no answer (client 1 lost its memory") for each in others)


def test_nodes_are_found_by_what_they_say_and_must_fit_the_run():
    config = RunConfig(method="fedit", **TINY)
    nodes = find(Wire(config, [2, 0, 1]), [0, 1, 2], source_digest(), 5.0)
    assert nodes == {k: node_id(k) for k in (0, 1, 2)}
    with pytest.raises(FedloraError, match=r"clients \[2\] have no node"):
        find(Wire(config, [0, 1]), [0, 1, 2], source_digest(), 0.1)
    with pytest.raises(FedloraError, match="other code"):
        find(Wire(config, [0], client_app(site, "another")), [0], source_digest(), 5.0)
    twice = Wire(config, [0, 1])
    twice.context(1).node_config["partition-id"] = 0
    with pytest.raises(FedloraError, match="two nodes say that they are client 0"):
        find(twice, [0, 1], source_digest(), 5.0)


@pytest.mark.parametrize("name", ["rolora", "fedex", "flora", "feddg"])
def test_a_node_that_missed_a_round_hears_of_it_in_the_next(tmp_path, name):
    """Its message of round 2 was lost: in round 3 it ends as if it had not been asked in round 2."""
    config = RunConfig(method=name, **TINY)
    wire = Wire(config, range(3))
    wire.lost = lambda client, kind, round: client == 1 and round == "2"
    records, final, _ = over_the_wire(config, tmp_path, wire)
    assert [r["refused"] for r in records[1:-1]] == [[], ["client 1: no answer"], []]
    _, local = in_process(config, lambda round: [0, 2] if round == 2 else [0, 1, 2])
    assert S.digest(final) == S.digest(local.server.state)


@pytest.fixture
def seeded_noise(monkeypatch):
    """Noise from the seed, which a network refuses, so that two runs can be compared."""
    monkeypatch.setattr(network, "check_noise", lambda config: None)


@pytest.mark.usefixtures("seeded_noise")
@pytest.mark.parametrize("unit", ["image", "client"])
def test_the_result_tells_what_privacy_cost_as_the_in_process_run_does(tmp_path, unit):
    """A node that was asked and whose answer was lost has spent as much as the others."""
    given = {"sigma": 1.0, "accountant": "rdp", "unit": unit}
    config = RunConfig(method="fedit", **TINY, **given)
    _, local = in_process(config)
    records, final, _ = over_the_wire(config, tmp_path)
    assert S.digest(final) == S.digest(local.server.state)
    told = records[-1]["privacy"]
    assert told == local.promise.told(3)["privacy"] and told["epsilon"] > 0
    wire = Wire(config, range(3))
    wire.lost = lambda client, kind, round: client == 1 and round == "2"
    lossy, _, _ = over_the_wire(config, tmp_path, wire)
    assert lossy[-1]["privacy"] == told


@pytest.mark.usefixtures("seeded_noise")
def test_a_run_over_a_network_stops_before_the_round_that_its_budget_does_not_allow(tmp_path):
    config = RunConfig(method="fedit", **TINY, sigma=1.0, accountant="rdp")
    two = in_process(config.but(rounds=2))[1].promise.told(2)["privacy"]["epsilon"]
    records, _, _ = over_the_wire(config.but(epsilon=1.001 * two), tmp_path)
    assert [r["event"] for r in records] == ["start", "round", "round", "result"]
    told = records[-1]["privacy"]
    assert told["epsilon"] == two and told["stopped"].startswith("round 3 would spend")
