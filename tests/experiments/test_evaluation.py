"""How the models of a federation are scored: a site's own, the common one, and one fitted to a newcomer."""

import math

import torch

from fedlora_mini.adapters.base import call
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation
from fedlora_mini.federation.works.average import unlabelled

TINY = {"sites": "2", "size": 32, "rounds": 3, "steps": 2, "batch": 2, "rank": 2, "threads": 1}
TINY |= {"data_options": {"per_site": 6, "val": 2, "test": 3}}


def test_pooled_training_gives_every_site_the_same_model():
    federation = Federation.build(RunConfig(method="pooled", **TINY))
    list(federation.rounds())
    assert federation.engine.clients == [0]
    scores = federation.evaluate(hd95=False)
    assert scores["personal"] == scores["global"]


def test_the_common_model_is_scored_with_the_servers_notes():
    """Whether or not the sites' own models, which read the notes that they have, were scored before it."""
    federation = Federation.build(RunConfig(method="harmofl", **TINY | {"rounds": 1}))
    list(federation.rounds())
    alone = federation.evaluate(hd95=False, protocols=("global",))["global"]
    assert federation.evaluate(hd95=False)["global"] == alone


def test_a_newcomer_without_masks_is_fitted_too():
    """IOP-FL's own term on boundaries has none to look at where an image has one label."""
    federation = Federation.build(
        RunConfig(method="iop", data="digits", model="vit", **TINY | {"data_options": {}, "sites": None, "size": 12})
    )
    state, images = federation.engine.common(federation.server), federation.data.sites[0].test.images[:4]
    p = call(federation.model, state, images).softmax(1)
    mirrored = call(federation.model, state, images.flip(-1)).softmax(1)
    entropy = -(p * p.log()).sum(1).mean() / math.log(p.shape[1])
    expected = 10 * entropy + 0.1 * (p - mirrored).square().sum(1).mean()
    assert torch.allclose(unlabelled(federation.model, state, images), expected)
