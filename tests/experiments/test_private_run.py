"""`fedlora run --epsilon …`: the figure in the record, the run that stops, the ledger that survives a kill."""

import json
import math
import warnings

import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import federation as federations
from fedlora_mini.experiments import run as runs
from fedlora_mini.experiments.checkpoint import load_checkpoint
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.experiments.promise import guard_of, with_client_privacy
from fedlora_mini.experiments.report import summary
from fedlora_mini.experiments.run import run
from fedlora_mini.privacy import BudgetSpent, Release, epsilon

TINY = {"size": 32, "sites": "3", "rounds": 3, "steps": 2, "batch": 2, "threads": 1}
TINY |= {"data_options": {"per_site": 6, "val": 1, "test": 2, "n_unseen": 1}, "accountant": "rdp"}


def config(**changes):
    return RunConfig(**TINY | {"method": "fedit", "epsilon": 3.0} | changes)


def test_the_record_says_what_the_figure_depends_on(tmp_path):
    told = run(config(), tmp_path)["privacy"]
    assert told["q"] == pytest.approx(2 / 6) and told["releases"] == [6, 6, 6] and told["stopped"] == ""
    assert 2.9 < told["epsilon"] <= 3.0
    assert told["epsilon"] == epsilon([Release(told["sigma"], told["q"], 6)], told["delta"], told["accountant"])
    assert json.loads((tmp_path / "result.json").read_text())["loss"] == [None] * 3


def test_what_is_not_private_may_be_tried_under_noise_and_the_record_says_why_there_is_no_epsilon(tmp_path):
    own = config(method="as_lora", change={"curvature": "raw"}, epsilon=None, sigma=1.0, rounds=1)
    told = run(own, tmp_path / "raw")["privacy"]
    assert told["epsilon"] == math.inf and told["releases"] == [2, 2, 2]
    assert "tells of its images by more than gradients" in told["not_dp"]
    assert json.loads((tmp_path / "raw/result.json").read_text())["privacy"] == told
    assert summary([run(own, tmp_path / "raw")])["ε for one image"].item().startswith("inf at")
    plain = run(own.but(change={}), tmp_path / "plain")["privacy"]
    assert plain["epsilon"] < math.inf and "not_dp" not in plain
    with pytest.raises(FedloraError, match="no privacy budget"):
        own.but(epsilon=3.0)
    with pytest.raises(FedloraError, match=r"'MOON': .* reads images beside the private gradient"):
        own.but(method="moon", change={})


def test_a_finished_run_has_its_ledgers(tmp_path):
    """What was spent stays spent, whoever opens the folder."""
    result = run(config(), tmp_path)
    federation = Federation.finished(tmp_path)
    assert federation.promise.told(3)["privacy"] == result["privacy"]
    with pytest.raises(BudgetSpent):
        federation.engine.members[0].fit(4)


def test_noise_that_a_run_has_used_is_used_up_for_whoever_opens_its_folder(tmp_path, monkeypatch):
    """After the end and after a kill: another start with the same noise would show the difference bare."""
    own = config(epsilon=None, sigma=1.0)
    run(own, tmp_path / "whole")
    kill_after_two_rounds(own, tmp_path / "killed", monkeypatch)
    resumed = Federation.build(own)
    load_checkpoint(tmp_path / "killed/checkpoint.safetensors", resumed.server, resumed.engine)
    for federation, last in ((Federation.finished(tmp_path / "whole"), 3), (resumed, 2)):
        for member in federation.engine.members:
            with pytest.raises(FedloraError, match=f"released gradients of round {last} for 'batches' already"):
                member.fit(last)
        member.fit(last + 1)


def test_a_run_whose_checkpoint_is_gone_does_not_begin_with_empty_ledgers(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(record):
        if record["round"] == 2:
            raise Killed

    for name, settings in (("private", config()), ("plain", config(epsilon=None))):
        with pytest.raises(Killed):
            run(settings, tmp_path / name, killed)
        (tmp_path / name / "checkpoint.safetensors").unlink()
    with pytest.raises(FedloraError, match="what it released stays released"):
        run(config(), tmp_path / "private")
    assert run(config(epsilon=None), tmp_path / "plain")["event"] == "result", "nothing was promised there"


def test_nobody_is_told_to_delete_a_ledger(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(record):
        raise Killed

    for name, budget, advice in (
        ("private", 8.0, "add up what both runs spend: what this one released stays released"),
        ("plain", None, "or delete this one to start again"),
    ):
        folder, settings = tmp_path / name, config(epsilon=budget)
        with pytest.raises(Killed):
            run(settings, folder, killed)
        with pytest.raises(FedloraError, match=f"another run's checkpoint.*{advice}"):
            run(settings.but(lr=0.5), folder)
        with monkeypatch.context() as patch, pytest.raises(FedloraError, match=f"other code.*{advice}"):
            patch.setattr("fedlora_mini.experiments.provenance.versions", lambda: {"source": "another"})
            run(settings, folder)
        older = settings.asdict() | {"a_setting_of_older_code": 1}  # which no RunConfig takes
        with pytest.raises(FedloraError, match=f"another run's checkpoint.*{advice}"):
            runs._check_same({"config": older}, {"config": settings.asdict()}, folder)
        (folder / "checkpoint.safetensors").write_bytes(b"cut short")
        with pytest.raises(FedloraError, match=f"is damaged.*{advice}"):
            run(settings, folder)


@pytest.mark.parametrize("accountant", ["gdp", "zcdp"])
def test_an_account_that_would_fail_in_the_end_fails_before_anything_is_trained(tmp_path, accountant):
    settings = config(epsilon=None, sigma=1.0, accountant=accountant)
    with pytest.raises(FedloraError, match="knows no sampling"):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_summary_prints_every_number_with_the_figure(tmp_path):
    result = run(config(rounds=1), tmp_path)
    row = summary([result]).loc["FedIT"]
    assert row["ε for one image"].endswith("at δ = 1e-05 (rdp)") and row["releases"] == "2" and row["q"] == "0.333"
    assert float(row["σ"]) == pytest.approx(result["privacy"]["sigma"], rel=0.01)
    assert "ε for one image" not in summary([{k: v for k, v in result.items() if k != "privacy"}])


def test_the_summary_says_who_is_protected(tmp_path):
    result = run(config(rounds=1, unit="client", fraction=0.5), tmp_path)
    assert "ε for one client" in summary([result]).columns


def test_without_being_asked_nothing_is_private_and_nothing_is_said(tmp_path):
    assert "privacy" not in run(config(epsilon=None), tmp_path)


def test_a_run_stops_before_the_round_that_its_budget_does_not_allow(tmp_path):
    two = epsilon([Release(1.0, 2 / 6, 4)], 1e-5, "rdp")
    result = run(config(sigma=1.0, epsilon=1.001 * two), tmp_path)
    assert len(result["loss"]) == 2 and result["privacy"]["releases"] == [4, 4, 4]
    assert result["privacy"]["stopped"].startswith("round 3 would spend")
    assert result["privacy"]["epsilon"] == two


def kill_after_two_rounds(own, folder, monkeypatch):
    """Leave the folder of a run that was interrupted behind its second checkpoint."""
    save, saved = runs.save_checkpoint, []

    def kill(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", kill)
        run(own, folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_ledger_that_it_had(tmp_path, monkeypatch):
    whole = run(config(), tmp_path / "whole")
    kill_after_two_rounds(config(), tmp_path / "killed", monkeypatch)
    again = run(config(), tmp_path / "killed")
    assert again["final_sha256"] == whole["final_sha256"] and again["privacy"] == whole["privacy"]


def test_noise_is_planned_for_the_client_that_takes_part_most_often():
    some = config(fraction=0.4, rounds=10)
    asked = [k for t in range(1, 11) for k in some.chosen([0, 1, 2], t)]
    most = max(map(asked.count, range(3)))
    assert most < 10
    guard = guard_of(some, [6, 6, 6])
    assert 2.9 < epsilon([Release(guard.mechanism.sigma, guard.mechanism.q, 2 * most)], 1e-5, "rdp") <= 3.0


def test_all_clients_draw_at_one_rate_and_the_largest_rate_is_one():
    assert guard_of(config(batch=4), [4, 12, 8]).mechanism.q == pytest.approx(0.5)
    assert guard_of(config(batch=64), [4, 12, 8]).mechanism.q == 1.0


def test_a_delta_at_which_one_of_all_may_be_published_is_warned_of():
    """delta >= 1/n for the smallest client's n images, or for n clients."""
    images, clients = config(delta=0.125), config(delta=0.25, unit="client")
    with pytest.warns(UserWarning, match=r"delta 0.125 protects nobody among 8 images of a client.*below 1/8") as told:
        guard_of(images, [20, 8, 30])
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"delta 0.25 protects nobody among 4 clients") as told:
        with_client_privacy(clients.row, clients, 4)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard_of(images, [20, 7, 30])
        with_client_privacy(clients.row, clients, 3)
        for own in (config(), config(unit="client"), config(epsilon=None, delta=0.9)):  # the last one promises nothing
            Federation.build(own)


def test_images_gradients_are_held_as_many_at_once_as_the_config_says():
    assert guard_of(config(micro=3), [6, 6]).mechanism.micro == 3 and guard_of(config(), [6, 6]).mechanism.micro == 64


def test_every_row_takes_a_filter():
    federation = Federation.build(config(change={"filter": "low-pass", "taps": 3}))
    [term] = federation.engine.method.objective
    assert (term.label, term.taps) == ("low-pass filter", 3)
    assert config(change={"filter": "none"}).row.objective == ()


@pytest.mark.slow
def test_clients_can_be_what_is_protected(tmp_path):
    own = config(unit="client", fraction=0.5, rounds=4, clip=0.1)
    whole = run(own, tmp_path)
    told = whole["privacy"]
    assert told["unit"] == "one client more or less" and told["q"] == 0.5 and told["releases"] == [4]
    assert told["epsilon"] == epsilon([Release(told["sigma"], 0.5, 4)], 1e-5, "rdp") <= 3.0
    sizes = {len(own.chosen([0, 1, 2], t)) for t in range(1, 60)}
    assert sizes == {0, 1, 2, 3}, "a Poisson sample of clients, sometimes nobody"
    assert run(own, tmp_path / "again")["final_sha256"] == whole["final_sha256"]


def test_scores_of_one_model_for_all_read_no_change_of_a_protected_client_beside_the_noised_mean():
    """Private tensors of a row stand at their start there: their mean was neither clipped nor noised."""
    federation = Federation.build(config(method="fedsa", unit="client", clip=0.1))
    start = dict(federation.server.state)
    list(federation.rounds())
    common = federation.engine.common(federation.server)
    private = {name for name in common if federation.engine.private(name)}
    assert common.keys() == start.keys() and private
    assert {name for name in common if torch.equal(common[name], start[name])} == private
    assert not torch.equal(federation.engine.members[0].memory[min(private)], start[min(private)])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_record_tells_nothing_of_a_protected_clients_part_in_a_round(tmp_path, fraction):
    """Neither on disk nor on the screen; who takes part and what it costs only where everybody does.

    How many images a site has and how well the model does there is no part of a round, and is told.
    """
    shown = []
    result = run(config(unit="client", fraction=fraction, clip=0.1), tmp_path, shown.append)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert shown == [record for record in logged if record["event"] == "round"]
    for record in shown:
        assert record["loss"] is None and record["agg_err"] is None and record["refused"] == []
        told = [record[name] for name in ("clients", "bytes_up", "bytes_down", "seconds")]
        assert None not in told if fraction == 1 else told == [None] * 4
    assert result["loss"] == result["agg_err"] == [None] * 3 and result["refused"] == []
    assert (result["seconds"] is None) == (fraction < 1)
    assert result["scores"]["server"]["model"].keys() == {"energy"}, "of the noised model"
    assert result["private_in_common_model"] == "start"
    row = summary([result]).loc["FedIT"]
    assert row["agg. error"] == "–" and (row["KB up / client / round"] == "–") == (fraction < 1)
    assert (row["s / run"] == "–") == (fraction < 1)


@pytest.mark.parametrize("secure", [False, True])
def test_seconds_do_not_tell_how_many_images_secret_coins_drew(tmp_path, secure):
    shown = []
    result = run(config(secure=secure, rounds=2), tmp_path, shown.append)
    assert [r["seconds"] is None for r in (*shown, result)] == [secure] * 3
    assert [took is None for took in result["round_seconds"]] == [secure] * 2


def test_private_images_leave_the_error_of_updates_that_are_noised_already(tmp_path, monkeypatch):
    """Their updates, with noise and without: the error that is told follows from the former."""
    seen = []

    class Watched(federations.AggregationError):
        def add(self, update):
            assert math.isnan(update.loss)
            super().add(update)

        def value(self, after):
            seen.append(super().value(after))
            return seen[-1]

    monkeypatch.setattr(federations, "AggregationError", Watched)
    assert run(config(), tmp_path)["agg_err"] == seen and len(seen) == 3


@pytest.mark.parametrize("secure", [False, True])
def test_a_secure_run_draws_other_clients_every_time(secure):
    own = config(unit="client", fraction=0.5, secure=secure)
    first, again = ([own.chosen([*range(20)], t) for t in range(1, 11)] for _ in range(2))
    assert (first == again) == (not secure)
    everybody = config(fraction=0.5, secure=secure)  # images protected: participants are no part of the account
    assert everybody.chosen([0, 1, 2, 3], 1) == everybody.but(secure=False).chosen([0, 1, 2, 3], 1)


@pytest.mark.parametrize("unit", ["image", "client"])
def test_a_killed_secure_run_goes_on_with_its_account_and_other_numbers(tmp_path, monkeypatch, unit):
    whole = run(config(secure=True, unit=unit), tmp_path / "whole")
    assert whole["final_sha256"] != run(config(secure=True, unit=unit), tmp_path / "again")["final_sha256"]
    kill_after_two_rounds(config(secure=True, unit=unit), tmp_path / "killed", monkeypatch)
    assert run(config(secure=True, unit=unit), tmp_path / "killed")["privacy"] == whole["privacy"]


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "normalised"])
def test_clients_are_clipped_as_the_record_says(tmp_path, clipping):
    own = config(unit="client", clipping=clipping, clip=0.1, rounds=1)
    rule = Federation.build(own).engine.method.rule
    assert rule.clipping == clipping
    told = run(own, tmp_path)["privacy"]
    assert (told["clip"], told["clipping"]) == (0.1, clipping)


def test_clients_budgets_end_a_run_too(tmp_path):
    two = epsilon([Release(1.0, 1.0, 2)], 1e-5, "rdp")
    told = run(config(unit="client", sigma=1.0, epsilon=1.001 * two), tmp_path)["privacy"]
    assert told["releases"] == [2] and told["stopped"].endswith("at the server")
