"""M7: what one site's nuisance does to shared factors, and M1 over several steps; the stored measurement."""

from pathlib import Path

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.experiments import counterfactual
from fedlora_mini.experiments.claims import CLAIMS
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.counterfactual import (
    ARMS,
    ORDERS,
    SEEDS,
    SETTINGS,
    coupling,
    measure,
    moved,
    shared_factors,
    trained,
    unshifted,
    without,
)
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.report import arms, read_results, table_of
from fedlora_mini.federation.member import Member

STORED = Path(__file__).parents[2] / "results" / "counterfactual.jsonl"
OPTIONS = {"n_sites": 3, "per_site": 4, "val": 1, "test": 1, "n_unseen": 0, "appearance": [1, 0, 1], "supervision": 0}
TINY = SETTINGS | {"data_options": OPTIONS, "size": 32, "rounds": 2, "steps": 2, "batch": 2, "rank": 2, "base": "none"}
IAT = RunConfig("iat", **TINY)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def record():
    torch.set_num_threads(1)
    return measure(IAT, orders=2)


def test_a_site_without_a_nuisance_leaks_nothing_and_the_others_do(record):
    found = record["leakage"]
    for metric in ("m7", "m7_encoder", "m7_decoder"):
        assert found[metric][1] == 0, "its images and outlines were as they are without shifts"
        assert found[metric][0] > 0 and found[metric][2] > 0
        assert len(found[f"{metric}_chance"]) == 2 and min(found[f"{metric}_chance"]) > 0
    assert 0 < found["m1_steps"] < 1 and 0 < found["m1_steps_chance"] < 1
    assert {"config", "versions", "machine", "sites", "seconds"} <= record.keys()


def test_the_counterfactual_changes_one_site_and_no_anatomy():
    config = IAT.but(data_options=OPTIONS | {"supervision": 1})
    real, plain = dataset_of(config), unshifted(config)
    other = without(real, plain, 2)
    for k, (a, b, c) in enumerate(zip(real.sites, other.sites, plain.sites, strict=True)):
        assert b is (c if k == 2 else a)
    assert not torch.equal(real.sites[2].train.images, other.sites[2].train.images)
    assert not torch.equal(real.sites[2].train.masks, other.sites[2].train.masks)
    overlap = (real.sites[2].train.masks > 0) & (other.sites[2].train.masks > 0)
    assert overlap.sum() > 0.5 * (other.sites[2].train.masks > 0).sum(), "the same organs at the same places"


def test_another_order_deals_the_batches_anew_and_nothing_else():
    real = dataset_of(IAT)
    federations = [trained(IAT, real, order) for order in (0, 0, 1)]
    names = list(shared_factors(federations[0]))
    assert {name[-1] for name in names} == {"A", "B"}
    assert moved(federations[0], federations[1], names) == 0
    assert moved(federations[0], federations[2], names) > 0
    plain = Federation.build(IAT, real)
    list(plain.rounds())
    assert S.digest(plain.server.state) == S.digest(federations[0].server.state), "order 0 is the run itself"


def test_a_distance_is_that_of_all_shared_factors_in_units_of_the_way_from_the_start():
    real = dataset_of(IAT)
    one, other = trained(IAT, real), trained(IAT, real, 1)
    start, names = Federation.build(IAT, real).server.state, shared_factors(one)
    assert set(names.values()) == {"encoder", "decoder"}
    a, b, c = (torch.cat([s[n].flatten() for n in names]) for s in (one.server.state, other.server.state, start))
    assert moved(one, other, list(names)) == pytest.approx(float((a - b).norm() / (a - c).norm()), rel=1e-5)


def test_a_planted_leak_is_found(monkeypatch):
    """A client whose scanner is odd says so in every shared factor that it sends."""
    real, plain = dataset_of(IAT), unshifted(IAT)
    other, odd = without(real, plain, 0), real.sites[0].train.images

    def m7():
        own = trained(IAT, real)
        return moved(own, trained(IAT, other), list(shared_factors(own)))

    clean, close = m7(), Member.close

    def leaking(self, end, *rest):
        mark = 0.2 * torch.equal(self.data.images, odd)
        return close(self, {n: v if self.setting.private(n) else v + mark for n, v in end.items()}, *rest)

    monkeypatch.setattr(Member, "close", leaking)
    assert clean < 0.5 < 0.8 < m7()


@pytest.mark.slow
def test_over_several_steps_too_equal_private_factors_couple_nothing():
    federation = trained(IAT)
    assert coupling(federation)["m1_steps"] > 1e-4
    members = federation.engine.members
    for member in members:
        member.memory |= members[0].own(members[0].memory)
    same = coupling(federation)
    assert same["m1_steps"] < 1e-9 and same["m1_steps_chance"] < 1e-9


def test_records_that_a_file_holds_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual, "SETTINGS", TINY)
    monkeypatch.setattr(counterfactual, "SEEDS", range(2))
    made = []
    monkeypatch.setattr(
        counterfactual, "measure", lambda config: made.append(config.seed) or {"config": config.asdict()}
    )
    for _ in range(2):
        counterfactual.main(tmp_path / "x.jsonl", {"iat": {}})
    assert made == [0, 1] and len((tmp_path / "x.jsonl").read_text().splitlines()) == 2


def test_the_stored_measurement_is_paired_complete_and_read_by_its_claim():
    results = read_results([STORED])
    claim = CLAIMS["sor-lowers-m7"]
    assert arms(results) == [claim.b, claim.a] and len(results) == len(ARMS) * len(SEEDS)
    for r in results:
        given = RunConfig(r["config"]["method"], change=r["config"]["change"], seed=r["config"]["seed"], **SETTINGS)
        assert r["config"].items() <= given.asdict().items() and {"versions", "machine", "seconds"} <= r.keys()
    for name in arms(results):
        for region in ("", "_encoder", "_decoder"):
            values = table_of(results, name, "leakage", f"m7{region}")
            chance = table_of(results, name, "leakage", f"m7{region}_chance")
            assert values.shape == (len(SEEDS), 4) and chance.shape == (len(SEEDS), ORDERS)
            assert (values > 0).all() and (chance > 0).all()
        assert table_of(results, name, "leakage", "m1_steps").shape == (len(SEEDS), 1)


@pytest.mark.slow
def test_a_stored_distance_made_again_is_the_same():
    """Up to the last bits of another machine's arithmetic, which training amplifies."""
    old = next(r for r in read_results([STORED]) if (r["config"]["method"], r["config"]["seed"]) == ("iat", 0))
    config = RunConfig(**old["config"])
    real = dataset_of(config)
    own, other = trained(config, real), trained(config, without(real, unshifted(config), 0))
    assert moved(own, other, list(shared_factors(own))) == pytest.approx(old["leakage"]["m7"][0], rel=0.1)
