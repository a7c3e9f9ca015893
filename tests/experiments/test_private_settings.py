"""What a private run may be asked for: precisions, networks, a clip of any size; which settings are named as bad."""

import math

import pytest
import torch

from fedlora_mini import state as S
from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation


def config(**changes):
    small = {"method": "fedit", "size": 32, "sites": "3", "rounds": 3, "steps": 2, "batch": 2, "threads": 1}
    data = {"per_site": 6, "val": 1, "test": 2, "n_unseen": 1}
    return RunConfig(**small | {"epsilon": 3.0, "accountant": "rdp", "data_options": data} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"sigma": -1.0}, "sigma"),
        ({"delta": 2.0}, "delta"),
        ({"accountant": "moments"}, "unknown accountant 'moments'"),
        ({"clip": 0.0}, "C must be positive"),
        ({"micro": 0}, "micro must be at least 1, got 0"),
        ({"clipping": "flatt"}, "way to clip 'flatt'"),
        ({"passes": 1.0}, "leave out 'passes'"),
        ({"method": "moon"}, "'MOON'"),
        ({"unit": "patient"}, "unknown unit of privacy 'patient'"),
        ({"leakage": True}, "leakage .* without noise"),
        ({"leakage": True, "epsilon": None, "sigma": 1.0, "unit": "client"}, "leakage .* without noise"),
        ({"change": {"filter": "lowpass"}}, "unknown filter 'lowpass'.*Did you mean 'low-pass'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(FedloraError, match=message):
        config(**changes)


@pytest.mark.parametrize("execution", ["sequential", "grouped"])
@pytest.mark.parametrize("method", ["fedit", "fedprox"])
def test_a_private_run_in_bf16_follows_the_one_in_full_precision(execution, method):
    ends = {}
    for precision in ("float32", "bf16"):
        federation = Federation.build(config(method=method, execution=execution, precision=precision, rounds=1))
        start = federation.server.state
        list(federation.rounds())
        ends[precision] = S.sub(federation.server.state, start)
    assert {value.dtype for value in ends["bf16"].values()} == {torch.float32}
    apart = S.norm(S.sub(ends["bf16"], ends["float32"])) / S.norm(ends["float32"])
    assert 0 < apart < 0.1


def test_noise_on_running_statistics_is_refused_where_clients_are_protected():
    """A noised variance may be negative, and the network's answer then no number."""
    own = {"unit": "client", "epsilon": None, "sigma": 1.0, "model": "unet_bn", "base": "none"}
    with pytest.raises(FedloraError, match=r"running_.* variance negative.*without batch norms"):
        Federation.build(config(method="fedavg", **own))
    Federation.build(config(method="fedbn", **own))  # its norms stay home


def test_without_noise_nothing_has_to_be_clipped():
    for unit in ("image", "client"):
        federation = Federation.build(config(unit=unit, epsilon=None, sigma=0.0, clip=math.inf, rounds=1))
        list(federation.rounds())
        assert all(value.isfinite().all() for value in federation.server.state.values())
    with pytest.raises(FedloraError, match="finite C, or sigma = 0"):
        config(epsilon=None, sigma=1.0, clip=math.inf)
