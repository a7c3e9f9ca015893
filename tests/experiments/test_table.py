"""Every row of the method table, by a tiny run: what it trains, sends and keeps, and that it can be stopped."""

import re

import pytest
import torch

from fedlora_mini.data import load
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.run import run
from fedlora_mini.experiments.table import SITES, check, words
from fedlora_mini.federation import METHODS
from fedlora_mini.federation.member import Member

TINY = {"sites": "3", "size": 32, "rounds": 3, "steps": 3, "batch": 2, "rank": 4, "threads": 1, "base": "none"}
TINY |= {"data_options": {"per_site": 4, "val": 2, "test": 2}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    return load("phantom", size=32, sites=SITES, unseen=0, per_site=6, val=2, test=2)


QUICK = ("hetlora", "fedex", "ditto", "fedadam", "as_lora", "fedas", "lcfed", "fedproto")  # one of every kind of memory
SPLIT = ("fedit", "fedsa", "iat", "anti_iat", "dual", "hydra", "rolora")  # and of every way to share


def slow_but(quick, *before):
    """Every row, those outside `quick` marked slow."""
    return [pytest.param(*before, name, marks=[pytest.mark.slow] * (name not in quick)) for name in METHODS]


CASES = slow_but(QUICK + SPLIT, "minisam")
CASES += [pytest.param("unet", name, marks=pytest.mark.slow) for name in METHODS if name != "fedbn"]
CASES += [("unet_bn", "fedbn"), pytest.param("attention_unet", "fedbn", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_row_sends_keeps_and_trains_what_it_says(data, model, name):
    checked = check(name, model, data=data)
    assert checked.problems == []
    row = checked.row
    assert row.trained != "-"
    assert (row.bytes_up == 0) == (row.sent == "nothing")


def test_a_row_that_sends_more_than_it_says_is_caught(data, monkeypatch):
    """A client that hands out a private factor."""
    close = Member.close

    def leak(self, end, *rest):
        update = close(self, end, *rest)
        private = next(name for name in end if self.setting.private(name))
        return type(update)(update.client, update.state | {private: end[private]}, update.weight, update.loss)

    monkeypatch.setattr(Member, "close", leak)
    with pytest.raises(FedloraError, match="no usable update"):
        check("iat", data=data)


def test_a_row_whose_clients_do_not_train_is_caught(data, monkeypatch):
    from fedlora_mini.engines import local

    def asleep(model, method, keys, states, *args, **more):
        return [dict(state) for state in states], [0.0] * len(states)

    monkeypatch.setattr(local, "train", asleep)
    assert "no B of encoder was trained" in check("ffa", data=data).problems


@pytest.mark.parametrize("name", ["iat", "fedsa", "dual", "fedrep", "fedbn"])
def test_a_row_whose_clients_forget_their_private_tensors_is_caught(data, monkeypatch, name):
    """Every round begins from the private tensors of the first."""
    first, receive = {}, Member.receive

    def reset(self, request):
        first.setdefault(self.number, self.own(self.memory))
        self.memory = self.memory | first[self.number]
        receive(self, request)

    monkeypatch.setattr(Member, "receive", reset)
    problems = check(name, data=data).problems
    assert len(problems) == SITES and all("has not kept" in problem for problem in problems)


@pytest.mark.parametrize(
    "name", ["ditto", "iop", "fedalt", "moon", "as_lora", pytest.param("resfim", marks=pytest.mark.slow)]
)
def test_a_row_whose_clients_take_no_notes_is_caught(data, monkeypatch, name):
    monkeypatch.setattr(Member, "keep", lambda self, prefix, state: None)
    wanted = [f"client {k} does not keep '{note}'" for note in METHODS[name].work.notes for k in range(SITES)]
    assert check(name, data=data).problems == wanted


@pytest.mark.parametrize(
    "name", ["feddg", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ditto", "fedas", "resfim"))]
)
def test_a_row_whose_clients_lose_their_notes_between_rounds_is_caught(data, monkeypatch, name):
    receive = Member.receive

    def forget(self, request):
        self.memory = {n: v for n, v in self.memory.items() if not n.startswith(METHODS[name].work.notes)}
        receive(self, request)

    monkeypatch.setattr(Member, "receive", forget)
    assert sum("has not kept" in problem for problem in check(name, data=data).problems) >= SITES


def test_a_row_whose_clients_keep_the_same_is_caught(data, monkeypatch):
    """As if what is private had been averaged."""
    own = Member.own
    monkeypatch.setattr(Member, "own", lambda self, state: {n: torch.zeros_like(state[n]) for n in own(self, state)})
    assert "clients keep the same 'private tensors'" in check("iat", data=data).problems


def test_a_row_that_keeps_nothing_of_a_network_is_caught_and_not_built(data):
    """MONAI's UNet has instance norms without weights and statistics: FedBN on it would be FedAvg."""
    told = "'FedBN' shares all but norms, and of model 'unet' that is everything.*norms with weights.*unet_bn"
    [problem] = check("fedbn", "unet", data=data).problems
    assert re.match(told, problem)
    with pytest.raises(FedloraError, match=told):
        Federation.build(RunConfig(method="fedbn", model="unet", **TINY))
    assert check("fedavg", "unet", data=data).problems == []


def test_fedbn_on_a_unet_with_batch_norms_is_not_fedavg():
    ends = []
    for name in ("fedbn", "fedavg"):
        federation = Federation.build(RunConfig(method=name, model="unet_bn", **TINY | {"rounds": 2}))
        list(federation.rounds())
        own = federation.states()["client 0"]
        assert bool(own) == (name == "fedbn") == any(n.endswith("running_mean") for n in own)
        ends.append(federation.server.state)
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_private_gradients_through_batch_norms_that_train_are_refused_with_the_reason():
    for name in ("fedbn", "fedavg"):
        with pytest.raises(FedloraError, match=r"batch norm .* mixes the samples"):
            Federation.build(RunConfig(method=name, model="unet_bn", sigma=1.0, **TINY))


@pytest.mark.parametrize(
    ("name", "up"),
    [
        ("fedit", lambda m, n, r: r * (m + n)),
        ("ffa", lambda m, n, r: m * r),
        ("fedsa", lambda m, n, r: r * n),
        ("inverse_fedsa", lambda m, n, r: m * r),
        ("flora", lambda m, n, r: r * (m + n)),
    ],
)
def test_bytes_up_are_those_of_the_card(data, name, up):
    """The bytes of chapter 8, in floats by layer, plus the head where it travels."""
    from fedlora_mini.adapters import adapters
    from fedlora_mini.adapters.lora import LoRA
    from fedlora_mini.adapters.ops import matrix_shape
    from fedlora_mini.experiments.table import setting

    engine, server = setting(name, data=data)
    layers = [a for _, a in adapters(engine.setting.model) if isinstance(a, LoRA)]
    floats = sum(up(*matrix_shape(layer.base), 4) for layer in layers)
    head = [v.numel() for n, v in server.state.items() if engine.keys[n].region == "head" and not engine.private(n)]
    assert check(name, data=data).row.bytes_up == 4 * (floats + sum(head))


def test_iat_sends_b_of_the_encoder_and_a_of_the_decoder(data):
    row = check("iat", data=data).row
    assert row.sent == "B of encoder, A of decoder, head" and row.kept == "A of encoder, B of decoder"


def test_words_name_a_network_s_own_weights_by_region():
    from fedlora_mini.adapters.base import Key

    table = [Key(f"{r}.x", f, r, "linear") for r in ("encoder", "decoder", "head") for f in ("weight", "bias")]
    assert words(table, table) == "encoder, decoder, head"
    assert words(table[:4], table) == "encoder, decoder"
    assert words([], table) == "-"


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", slow_but(QUICK))
def test_a_row_can_be_stopped_and_goes_on_to_the_same_bytes(tmp_path, name):
    more = {"ranks": [2, 4]} if name in ("flora", "hetlora") else {}
    config = RunConfig(method=name, **{**TINY, **more})
    whole = run(config, tmp_path / "whole")

    def stop(record):
        if record["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run(config, tmp_path / "parts", stop)
    again = run(config, tmp_path / "parts")
    assert again["final_sha256"] == whole["final_sha256"]
    assert again["scores"] == whole["scores"] and again["bytes_down"] == whole["bytes_down"]


def test_unequal_ranks_are_refused_where_the_rule_cannot_combine_them():
    with pytest.raises(FedloraError, match="unequal ranks"):
        RunConfig(method="fedit", ranks=[2, 4])
    with pytest.raises(FedloraError, match="from 1 to rank"):
        RunConfig(method="flora", rank=4, ranks=[8])


def test_a_row_takes_other_numbers():
    config = RunConfig(method="iat_sor", change={"lam": 0.5, "form": "exact"})
    [sor] = config.row.objective
    assert (sor.lam, sor.form) == (0.5, "exact")
    with pytest.raises(FedloraError, match="setting of 'IAT \\+ SOR' 'lamb'"):
        RunConfig(method="iat_sor", change={"lamb": 0.5})


@pytest.mark.parametrize("name", slow_but(("fedas", "moon", "resfim", "resfim_lora")))
def test_every_row_recognises_too_or_says_that_it_needs_masks(name):
    config = {"data": "digits", "model": "vit", "rounds": 2, "steps": 2, "batch": 4, "dirichlet": 1.0, "clients": 3}
    federation = Federation.build(RunConfig(name, threads=1, **config))
    if name == "feddg":
        with pytest.raises(FedloraError, match="it needs masks"):
            list(federation.rounds())
        return
    assert len(list(federation.rounds())) == 2
    federation.look()
    assert all(0 <= site["accuracy"] <= 1 for site in federation.evaluate()["global"].values())
