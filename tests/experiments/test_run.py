"""A run: the same bytes twice, a result with its provenance, three protocols."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.data import Split
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.report import table_of
from fedlora_mini.experiments.run import run
from fedlora_mini.federation.member import Member
from fedlora_mini.models import build
from fedlora_mini.models.pretrained import save_base

TINY = {"sites": "2", "size": 32, "rounds": 3, "steps": 2, "batch": 2, "rank": 2, "threads": 1}
TINY |= {"data_options": {"per_site": 6, "val": 2, "test": 3}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_result_says_what_made_it(tmp_path):
    result = run(RunConfig(method="iat", **TINY), tmp_path)
    assert result["config"]["method"] == "iat" and result["config"]["lr"] == 5e-3
    assert {"torch", "monai", "numpy", "python", "source"} <= result["versions"].keys()
    assert result["private_in_common_model"] == "weighted mean"
    assert result["machine"]["device"] == "cpu" and result["machine"]["threads"] == 1
    assert set(result["scores"]) == {"personal", "global", "new site"}
    assert set(result["scores"]["personal"]) == {"site1", "site2"}
    for protocol in result["scores"].values():
        for scores in protocol.values():
            assert 0 <= scores["dice"] <= 1 and 0 <= scores["hd95"] <= 32 * 2**0.5
    assert len(result["bytes_up"]) == len(result["agg_err"]) == len(result["round_seconds"]) == 3
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "round", "round", "round", "result"]


def test_a_site_that_never_trains_may_be_scored_on_all_that_it_has(tmp_path):
    """Its test share by default; with `whole_unseen` as if all its images were that share. Members' scores stay."""
    config = RunConfig(method="iat", **TINY | {"data_options": TINY["data_options"] | {"n_unseen": 1}})
    data = dataset_of(config)
    (site,) = data.unseen
    everything = replace(site, test=Split.concat([site.train, site.val, site.test]))
    assert len(everything.test) == 11 > len(site.test)
    share, whole = (run(config.but(whole_unseen=told), tmp_path / str(told))["scores"] for told in (False, True))
    expected = run(config, tmp_path / "expected", lambda record: None, lambda: replace(data, unseen=(everything,)))[
        "scores"
    ]
    assert whole == expected and share["new site"] != whole["new site"]
    assert {name: share[name] for name in ("personal", "global")} == {
        name: whole[name] for name in ("personal", "global")
    }


def test_a_record_says_which_weights_a_base_s_file_held(tmp_path):
    """A path may hold others tomorrow: a run that was begun from these does not go on from those."""
    base, told = tmp_path / "base.safetensors", []
    own = RunConfig(method="fedit", **TINY | {"base": str(base), "rounds": 2})

    def killed(record):
        raise KeyboardInterrupt

    for seed, error, message in ((0, KeyboardInterrupt, None), (1, FedloraError, "other weights")):
        save_base(build("minisam", 3, seed=seed), base, {"model": "minisam"})
        told.append(run(own, tmp_path / f"whole{seed}")["versions"]["base"])
        with pytest.raises(error, match=message):
            run(own, tmp_path / "killed", killed)
    assert len(told[0]) == 12 and told[0] != told[1]
    assert "base" not in run(RunConfig(method="fedit", **TINY | {"rounds": 0}), tmp_path / "shipped")["versions"]


def test_the_same_config_twice_gives_the_same_final_bytes(tmp_path):
    first, second = (run(RunConfig(method="fedsa", **TINY), tmp_path / name) for name in "ab")
    assert first["final_sha256"] == second["final_sha256"]
    assert first["scores"] == second["scores"]
    assert (tmp_path / "a/final.safetensors").read_bytes() == (tmp_path / "b/final.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "exact"), [("fedit", False), ("flexlora", False), ("ffa", True), ("rolora", True), ("fedex", True)]
)
def test_averaging_is_exact_where_one_factor_is_common_or_the_rest_is_folded(name, exact):
    """The lemma on a live run: what the mean has lost of the clients' products, as a share of them, in every round."""
    errors = [each.agg_err for each in Federation.build(RunConfig(method=name, **TINY)).rounds()]
    assert len(errors) == 3 and all(error < 1e-5 if exact else error > 1e-4 for error in errors)


def test_what_counts_as_trained(tmp_path):
    """No factor that never moves, no notes, nothing received: the numbers that local steps can change."""
    counts = {name: Federation.build(RunConfig(method=name, **TINY)).trained for name in ("fedit", "ffa", "fedalt")}
    state = Federation.build(RunConfig(method="fedit", **TINY)).server.state
    size = {f: sum(v.numel() for n, v in state.items() if n.endswith(f".{f}")) for f in "AB"}
    assert counts["fedit"] == S.count(state) == counts["ffa"] + size["A"]
    alt = Federation.build(RunConfig(method="fedalt", **TINY)).server.state
    assert counts["fedalt"] == S.count(S.pick(alt, lambda name: not name.endswith("_rest")))
    for name in ("harmofl", "fedalt"):  # both leave notes at the server
        config = RunConfig(method=name, **TINY)
        assert run(config, tmp_path / name)["trained"] == Federation.build(config).trained


OWN_MODELS = ["ditto", "resfim"]  # a second model, own entries of the common one
MORE = ["iat", "harmofl", "iop", "fedalt", "fdlora", "lcfed", "fedex"]
OWN_MODELS += [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.mark.parametrize("name", OWN_MODELS)
def test_a_finished_run_can_be_had_again_with_every_personal_model(tmp_path, name):
    """From its folder alone."""
    result = run(RunConfig(method=name, **TINY), tmp_path)
    scores = Federation.finished(tmp_path).evaluate()
    assert scores == {protocol: result["scores"][protocol] for protocol in scores}
    plain = {"ditto": "fedavg", "iop": "fedavg"}.get(name)
    if plain:
        assert result["final_sha256"] != run(RunConfig(method=plain, **TINY), tmp_path / "plain")["final_sha256"]


def test_a_run_meets_its_test_images_when_it_is_asked_to(tmp_path, monkeypatch):
    """A search does not ask; the best run of one is then tested from its folder, without training anew."""
    config, met = RunConfig(method="iat", **TINY), []
    evaluate = Federation.evaluate

    def watched(self, part="test", *rest, **named):
        met.append(part)
        return evaluate(self, part, *rest, **named)

    monkeypatch.setattr(Federation, "evaluate", watched)
    searched = run(config, tmp_path / "a", test=False)
    assert searched["scores"] == {} and searched["val_dice"] > 0 and set(met) == {"val"}
    met.clear()
    assert run(config, tmp_path / "a", test=False) == searched and not met
    whole = run(config, tmp_path / "b")
    met.clear()
    monkeypatch.setattr(Federation, "rounds", lambda self: pytest.fail("trained twice"))
    tested = run(config, tmp_path / "a")
    assert met == ["test"] and tested["scores"] == whole["scores"] and tested["seconds"] > searched["seconds"]
    assert {k: v for k, v in tested.items() if k not in ("scores", "seconds")} == {
        k: v for k, v in searched.items() if k not in ("scores", "seconds")
    }
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "round", "round", "round", "result"] and lines[-1] == tested
    assert run(config, tmp_path / "a") == run(config, tmp_path / "a", test=False) == tested, "finished is finished"


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_a_client_of_lower_rank_is_scored_with_its_own_directions(tmp_path, name):
    """Its model is the server's, cut to its rank; the run as it is had again has the same."""
    federation = Federation.build(config := RunConfig(method=name, **TINY | {"rank": 3, "ranks": [1, 3]}))
    list(federation.rounds())
    server, layer = federation.server, next(n for n in federation.server.state if n.endswith(".A"))
    low, high = (federation.engine.personal(k, server) for k in (0, 1))
    assert torch.equal(low[layer], server.state[layer][:1]) and torch.equal(high[layer], server.state[layer])
    scores = federation.evaluate()
    assert scores["personal"] is not scores["global"] and scores["personal"]["site2"] == scores["global"]["site2"]
    run(config, tmp_path)
    again = Federation.finished(tmp_path)
    assert torch.equal(again.engine.personal(0, again.server)[layer], low[layer])


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(FedloraError, match="holds no finished run: it lacks result"):
        Federation.finished(tmp_path)


@pytest.mark.slow
def test_a_run_holds_no_more_updates_than_its_rule(monkeypatch):
    """Of a mean that is the first one, the one at hand and the one before it; the error is measured as they pass."""
    alive, most, close = set(), [0], Member.close

    def counted(member, *args):
        update = close(member, *args)
        gc.collect()  # training leaves cycles
        alive.add(member.number)
        weakref.finalize(next(iter(update.state.values())), alive.discard, member.number)
        most[0] = max(most[0], len(alive))
        return update

    monkeypatch.setattr(Member, "close", counted)
    few = TINY | {"rounds": 1, "steps": 1, "dirichlet": 100.0, "clients": 5, "data_options": {"per_site": 8}}
    [record] = Federation.build(RunConfig(method="fedit", execution="sequential", **few)).rounds()
    assert record.agg_err is not None and len(record.clients) == 5 and most[0] <= 3


def test_bf16_runs_the_same_path(tmp_path):
    result = run(RunConfig(method="fedit", precision="bf16", **TINY), tmp_path / "bf16")
    other = run(RunConfig(method="fedit", precision="float32", **TINY), tmp_path / "float32")
    assert result["final_sha256"] != other["final_sha256"]
    assert result["loss"] == pytest.approx(other["loss"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["fedit", "fedavg", "iat"])
def test_cuda_with_bf16_follows_the_cpu(tmp_path, method):
    config = RunConfig(method=method, **TINY)
    gpu, cpu = (run(config.but(device=device), tmp_path / device) for device in ("cuda", "cpu"))
    assert gpu["machine"]["device"] == "cuda"
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fedid"}, "Did you mean 'fedit'"),
        ({"optimiser": "adm"}, "Did you mean 'adam'"),
        ({"device": "gpu"}, "accepted: auto, cpu, cuda"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"clients": 4}, "clients needs dirichlet"),
    ],
)
def test_a_bad_setting_is_one_clear_error(changes, message):
    with pytest.raises(FedloraError, match=message):
        RunConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "phantm"}, "Did you mean 'phantom'"),
        ({"model": "mini_sam"}, "Did you mean 'minisam'"),
        ({"size": 30}, "multiples of 4"),
        ({"base": "nowhere.safetensors"}, "cannot read base weights"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"data_options": {"apearance": 1}}, "Did you mean 'appearance'"),
        ({"model": "unet3d", "base": "none"}, "is 3D, the images are 2D"),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_one_clear_error(changes, message):
    with pytest.raises(FedloraError, match=message):
        Federation.build(RunConfig(**{**TINY, **changes}))


def test_a_dirichlet_partition_sets_the_number_of_clients():
    federation = Federation.build(RunConfig(dirichlet=5.0, **TINY))
    assert [site.name for site in federation.data.sites] == ["client0", "client1"]


@pytest.mark.slow
def test_a_record_says_what_the_rows_work_found(tmp_path):
    result = run(RunConfig(method="resfim", **TINY, change={"images": 2}), tmp_path)
    assert result["scores"]["work"].keys() == result["scores"]["personal"].keys()
    assert all(site.keys() == {"early", "beyond_floor"} for site in result["scores"]["work"].values())
    assert table_of([result], "resfim:images=2", "work", "early").shape == (1, len(result["scores"]["work"]))
    assert "work" not in run(RunConfig(method="fedit", **TINY), tmp_path / "other")["scores"]
