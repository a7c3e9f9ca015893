"""Updates of sites that differ in a known way, and predictions of made-up records against made-up tables."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora_mini.data import Split, load
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments import nearness as near
from fedlora_mini.experiments.nearness.prediction import costs, margins
from fedlora_mini.experiments.rotation import rotations, site_updates
from fedlora_mini.federation import Budget


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


# ---------------------------------------------------------------- updates


def test_turned_inputs_are_exact_for_one_b_and_turned_outputs_for_one_a():
    task, turns = draw(10, 2) @ draw(2, 12, seed=1), rotations(0.8, (4,), 12, rng())
    still, zero = torch.eye(10, dtype=torch.float64).expand(4, 10, 10), torch.zeros(10, 12, dtype=torch.float64)
    for updates, exact, other in (
        (site_updates(task, turns, still, zero, 0.0), "B", "A"),
        (site_updates(task, turns, still, zero, 0.0).mT, "A", "B"),
    ):
        found = near.sharing_errors(updates, 2)
        assert found[exact] < 1e-12 and found["own"] < 1e-12 and found[other] > 0.2
        assert found[f"{other} turned"] == pytest.approx(found[other], abs=0.15)  # nothing in common on that side
        scaled = near.sharing_errors(updates * torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None], 2)
        assert scaled[other] == pytest.approx(found[other])  # every site counts the same


def test_updates_with_nothing_in_common_lose_what_their_turned_copies_lose():
    found = near.sharing_errors(draw(5, 30, 20) @ torch.diag(0.7 ** torch.arange(20.0).double()), 3)
    assert found["B"] == pytest.approx(found["B turned"], abs=0.03)
    assert found["A"] < found["A turned"] - 0.1  # the columns' sizes are common, so its rows are
    assert max(found["own"], 0) <= min(found["A"], found["B"])


class Toy(nn.Module):
    """rho = 0: no frozen layer sees the inputs' rotation, since W_0 = 0. rho = 1: W_0 is as large as the update."""

    def __init__(self, rho=0.0, n=8, m=6):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(n, m, 1), nn.Conv2d(m, m, 1)
        self.encoder.weight.data = rho * torch.randn(m, n, 1, 1, generator=rng(7)) / n**0.5
        self.encoder.bias.data.zero_()
        self.head.weight.data, self.head.bias.data = torch.eye(m)[..., None, None], torch.zeros(m)

    def forward(self, x):
        return self.head(self.encoder(x))


def toy_sites(turned, K=6):
    """The same images at every site, their channels turned by R_k or not."""
    x = torch.randn(4, 8, 6, 6, generator=rng())
    masks = x[:, :6].argmax(1).byte()
    R = rotations(1.0, (K,), 8, rng(1)).float() if turned else torch.eye(8).expand(K, 8, 8)
    return [Split(torch.einsum("oc,nchw->nohw", R[k], x), masks) for k in range(K)]


FULL = Budget(steps=15, batch=4, lr=5e-3, augment=False)  # every batch holds all four images: no noise between sites


def excess(sites, start="dense", rho=0.0):
    updates, losses = near.local_updates(Toy(rho), sites, FULL, start, r=2)
    assert updates["encoder"].shape == (len(sites), 6, 8) and len(losses) == len(sites)
    found = near.sharing_errors(updates["encoder"], 2)
    return {"own": found["own"]} | {factor: found[factor] - found["own"] for factor in ("A", "B")}


def test_gradient_descent_keeps_the_common_columns_of_turned_sites_and_adam_does_not():
    dense, adam = (excess(toy_sites(turned=True), start) for start in ("dense", "dense, Adam"))
    assert dense["B"] < 1e-6 and dense["A"] > 0.2
    assert adam["B"] > 0.05 and adam["A"] > 0.2


def test_where_the_frozen_layer_sees_the_turn_one_b_is_still_the_cheaper_though_not_exact():
    found = excess(toy_sites(turned=True), rho=1.0)
    assert 0.01 < found["B"] < 0.05 and found["A"] > 0.15


def test_sites_that_name_the_classes_otherwise_can_share_a_exactly_and_not_b():
    """The supervision control: the same images, every site's structures permuted, T_k ΔW*. The background stays."""
    orders = [torch.cat([torch.zeros(1).long(), 1 + torch.randperm(5, generator=rng(k))]) for k in range(6)]
    other = [Split(s.images, order[s.masks.long()].byte()) for s, order in zip(toy_sites(False), orders, strict=True)]
    found = excess(other)
    assert found["A"] < 1e-6 and found["B"] > 0.05


def test_where_lora_starts_decides_what_looks_cheap_to_share():
    """A common A makes turned sites prefer one A, against the truth; own ones make sharing dear for sites alike."""
    alike, turned = toy_sites(turned=False), toy_sites(turned=True)
    assert max(excess(alike)[factor] for factor in "AB") < 1e-4
    assert min(excess(alike, "own A")[factor] for factor in "AB") > 0.2
    biased, true = excess(turned, "common A"), excess(turned)
    assert biased["A"] < biased["B"] - 0.1 and true["A"] > true["B"] + 0.1


def test_training_leaves_the_model_as_it_is_and_repeats_itself():
    model, sites = Toy(), toy_sites(turned=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, _ = near.local_updates(model, sites, FULL)
    second, _ = near.local_updates(model, sites, FULL)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(first["encoder"], second["encoder"]) and float(first["encoder"].norm()) > 0
    with pytest.raises(FedloraError, match="unknown start 'dence'"):
        near.local_updates(model, sites, FULL, "dence")


def test_dealt_images_are_the_same_images_at_as_many_sites():
    data = load("phantom", size=16, sites=3, per_site=20, val=3, test=3, appearance=1.0)
    anew = near.dealt(data)
    whole = [torch.cat([s.train.images for s in d.sites]).flatten(1).sum(1).sort().values for d in (data, anew)]
    assert torch.equal(*whole) and all(17 <= len(site.train) <= 23 for site in anew.sites)
    spread = [torch.stack([s.train.images.mean() for s in d.sites]).std() for d in (data, anew)]
    assert spread[1] < 0.5 * spread[0]


# ---------------------------------------------------------------- prediction


def record(seed, enc, dec, start="dense"):
    """A record with (A, B) losses of two encoder and two decoder layers, own = 0.1."""
    layers = {}
    for region, (a, b) in (("encoder", enc), ("decoder", dec)):
        for i in range(2):
            layers[f"{region}.{i}"] = {"region": region, start: {"own": 0.1, "A": 0.1 + a + 0.01 * i, "B": 0.1 + b}}
    return {"config": {"seed": seed}, "layers": layers}


def arms(fedsa, inverse, iat, anti, seeds=4, sites=3):
    noise = np.random.default_rng(0).normal(0, 0.003, (4, seeds, sites))
    names = ("fedsa", "inverse_fedsa", "iat_own_head", "anti_own_head")
    return {name: mean + e for name, mean, e in zip(names, (fedsa, inverse, iat, anti), noise, strict=True)}


def test_the_cheaper_factor_of_each_region_is_predicted_and_with_them_the_arm():
    iat = [record(seed, enc=(0.3, 0.1), dec=(0.05, 0.2)) for seed in range(3)]
    found = near.predict(iat)
    assert costs(iat, "encoder", "A") == pytest.approx(np.array([[0.3, 0.31]] * 3))
    assert margins(iat, "decoder").mean() == pytest.approx(-0.145)
    assert (found.leans["encoder"].factor, found.leans["decoder"].factor) == ("B", "A")
    assert found.best == found.assignment == "iat_own_head"
    assert sorted(found.cost, key=found.cost.get) == ["iat_own_head", "inverse_fedsa", "fedsa", "anti_own_head"]
    less, more = (0.1, 0.3), (0.3, 0.1)  # one A is the cheaper, one B
    for enc, dec, arm in ((less, less, "fedsa"), (more, more, "inverse_fedsa"), (less, more, "anti_own_head")):
        assert near.predict([record(0, enc, dec)]).assignment == arm
    unclear = [record(0, (0.3, 0.1), (0.3, 0.1)), record(1, (0.1, 0.3), (0.3, 0.1))]
    assert near.predict(unclear).assignment is None
    assert near.lean(iat, "encoder", null=margins(iat, "encoder")).factor is None
    with pytest.raises(FedloraError, match="no record holds updates 'dealt'"):
        near.predict(iat, "dealt")


def test_a_difference_of_two_arms_is_expected_from_the_regions_where_they_differ():
    iat = [record(seed, enc=(0.3, 0.1), dec=(0.05, 0.2)) for seed in range(3)]
    encoder, decoder = (margins(iat, region).mean() for region in ("encoder", "decoder"))
    assert near.expect(iat, "iat_own_head", "fedsa").margin == pytest.approx(encoder)
    assert near.expect(iat, "inverse_fedsa", "fedsa").margin == pytest.approx(encoder + decoder)
    both = near.expect(iat, "iat_own_head", "anti_own_head")
    assert both.margin == pytest.approx(encoder - decoder) and both.factor == "B"
    own = {region: margins(iat, region) for region in ("encoder", "decoder")}
    assert near.expect(iat, "iat_own_head", "anti_own_head", own).margin == 0


def test_the_observed_effect_of_a_factor_is_over_both_choices_in_the_other_region():
    found = near.effects(arms(fedsa=0.70, inverse=0.71, iat=0.76, anti=0.65))
    assert found["encoder"].mean == pytest.approx(0.06, abs=0.004)  # (.76 + .71 - .70 - .65) / 2
    assert found["decoder"].mean == pytest.approx(-0.05, abs=0.004)
    with pytest.raises(FedloraError, match="missing: anti_own_head"):
        near.effects({arm: table for arm, table in arms(1, 1, 1, 1).items() if arm != "anti_own_head"})


def test_a_prediction_holds_fails_stays_open_or_is_none():
    iat = near.predict([record(seed, (0.3, 0.1), (0.05, 0.2)) for seed in range(3)])
    good = near.check(iat, arms(fedsa=0.70, inverse=0.71, iat=0.76, anti=0.65))
    assert (good["encoder"], good["decoder"], good["tau"]) == ("held", "held", pytest.approx(1.0))
    assert good["best predicted"] == good["best seen"] == "iat_own_head"
    bad = near.check(iat, arms(fedsa=0.70, inverse=0.69, iat=0.65, anti=0.76))
    assert (bad["encoder"], bad["decoder"], bad["tau"]) == ("failed", "failed", pytest.approx(-1.0))
    flat = near.check(iat, arms(0.7, 0.7, 0.7, 0.7))
    assert (flat["encoder"], flat["decoder"]) == ("open", "open")
    half = near.predict([record(0, (0.3, 0.1), (0.3, 0.1)), record(1, (0.1, 0.3), (0.3, 0.1))])
    seen = near.check(half, arms(fedsa=0.70, inverse=0.74, iat=0.70, anti=0.74))
    assert (seen["encoder"], seen["decoder"]) == ("no prediction", "held")
