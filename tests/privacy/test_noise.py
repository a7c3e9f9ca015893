"""Noise of the right size from both sources, and the samples that accountants assume."""

import pytest
import torch
from scipy.stats import kstest

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.federation.sampling import generator
from fedlora_mini.privacy import Secure, Seeded, add_noise, poisson, rate

SOURCES = {"seeded": lambda: Seeded(generator(3)), "secure": lambda: Secure(), "secure, one part": lambda: Secure(1)}


@pytest.mark.parametrize("name", SOURCES)
def test_both_sources_are_standard_normal(name):
    x = SOURCES[name]().normal((200, 100), torch.float64)
    assert x.shape == (200, 100) and kstest(x.flatten().numpy(), "norm").pvalue > 1e-6
    rows = torch.corrcoef(x[:20])
    assert (rows - torch.eye(20)).abs().max() < 0.6, "entries do not repeat"


def test_the_seeded_one_repeats_and_the_secure_one_does_not():
    zero = {"a.A": torch.zeros(3, 4), "a.B": torch.zeros(5)}
    first, again = (add_noise(zero, 2.0, Seeded(generator(1, "noise"))) for _ in range(2))
    assert S.digest(first) == S.digest(again) and first["a.A"].dtype == torch.float32
    assert S.digest(add_noise(zero, 2.0, Secure())) != S.digest(add_noise(zero, 2.0, Secure()))


def test_it_does_not_depend_on_the_order_of_names():
    state = {"b": torch.zeros(4), "a": torch.zeros(3)}
    one, other = (add_noise(s, 1.0, Seeded(generator(1))) for s in (state, {"a": state["a"], "b": state["b"]}))
    assert list(one) == ["b", "a"] and S.digest(one) == S.digest(other)


def test_it_has_the_standard_deviation_and_is_added():
    start = {"a": torch.full((50_000,), 7.0)}
    x = add_noise(start, 3.0, Seeded(generator(0)))["a"]
    assert x.mean() == pytest.approx(7, abs=0.06) and x.std() == pytest.approx(3, rel=0.02)
    assert torch.equal(start["a"], torch.full((50_000,), 7.0)), "the argument stays"


def test_no_noise_leaves_the_bits_alone():
    start = {"a": torch.randn(9)}
    assert S.digest(add_noise(start, 0.0, Secure())) == S.digest(start)


@pytest.mark.parametrize("std", [-1.0, float("inf"), float("nan")])
def test_a_bad_deviation_is_named(std):
    with pytest.raises(FedloraError, match="standard deviation"):
        add_noise({"a": torch.zeros(1)}, std, Secure())


@pytest.mark.parametrize("rng", [generator("poisson"), None], ids=["seeded", "secure"])
def test_a_poisson_sample_has_every_record_with_its_own_coin(rng):
    draws = torch.zeros(4000, 40)
    for row in draws:
        row[poisson(40, 0.3, rng)] = 1
    assert draws.mean(0).sub(0.3).abs().max() < 0.04
    assert draws.sum(1).var() == pytest.approx(40 * 0.3 * 0.7, rel=0.1), "sizes differ as a binomial's"
    assert torch.corrcoef(draws.T).sub(torch.eye(40)).abs().max() < 0.09, "coins are independent"


def test_without_a_generator_no_sample_comes_again():
    seeded = [poisson(200, 0.5, generator(1)) for _ in range(2)]
    assert torch.equal(*seeded), "the same seed, the same records"
    assert torch.equal(
        seeded[0], torch.nonzero(torch.rand(200, generator=generator(1), dtype=torch.float64) < 0.5)[:, 0]
    )
    secret = set()
    for _ in range(20):
        torch.manual_seed(0)  # nor is it torch's own generator
        secret.add(tuple(poisson(200, 0.5, None).tolist()))
    assert len(secret) == 20


def test_the_ends_are_nobody_and_everybody():
    assert len(poisson(10, 0.0, generator(0))) == 0 and poisson(10, 1.0, generator(0)).tolist() == list(range(10))
    assert rate(8, 40) == 0.2
    assert len(poisson(10, 0.0, None)) == 0 and poisson(10, 1.0, None).tolist() == list(range(10))
    for bad in (lambda: poisson(5, 1.1, generator(0)), lambda: rate(0, 5), lambda: rate(6, 5)):
        with pytest.raises(FedloraError):
            bad()
