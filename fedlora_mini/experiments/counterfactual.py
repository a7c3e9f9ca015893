"""M7, leakage by its definition: ||θ - θ^(-j)|| / ||θ - θ_0||, what shared factors owe to one site's nuisance.

θ: the factors that travel after training, θ^(-j): after the same training in which site j's images and outlines have no
shift: same anatomies, initial weights and batches, θ_0: before. Its level is that ratio for other orders of the batches
(chapter 11). Beside it M1 over several steps, from one more round with other private factors. A line an arm and
seed; those that the file holds are not made again:

    python -m fedlora_mini.experiments.counterfactual runs/counterfactual.jsonl
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fedlora_mini import state as S
from fedlora_mini.adapters import trainable
from fedlora_mini.data import Dataset
from fedlora_mini.experiments.checkpoint import write_atomically
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.experiments.federation import Federation, dataset_of
from fedlora_mini.experiments.leakage import split_pairs
from fedlora_mini.experiments.lines import records_file
from fedlora_mini.experiments.provenance import machine, versions
from fedlora_mini.metrics.leakage import energy_null, leak_energy
from fedlora_mini.state import State

# Sites and shifts of results/factorial_both.jsonl, but gradient descent, as the paper has it, with the rate and steps
# of the book's chapter on leakage: under Adam another order of the batches moves as much as a site's shifts.
SETTINGS: dict[str, Any] = {
    "data_options": {"per_site": 24, "val": 1, "test": 1, "n_unseen": 0, "appearance": 1, "supervision": 1},
    "size": 48,
    "rounds": 4,
    "steps": 4,
    "batch": 4,
    "optimiser": "sgd",
    "lr": 0.3,
    "threads": 1,
    "device": "cpu",
}
ARMS: dict[str, dict[str, Any]] = {"iat": {}, "iat_sor": {"form": "exact", "lam": 0.01}}
SEEDS, ORDERS = range(8), 3


def unshifted(config: RunConfig) -> Dataset:
    """The phantom of a config with the same anatomies, in which no site has a shift."""
    return dataset_of(config.but(data_options=config.data_options | {"appearance": 0.0, "supervision": 0.0}))


def without(real: Dataset, plain: Dataset, site: int) -> Dataset:
    """`real`, but for one site, which is as in `plain`."""
    return replace(real, sites=(*real.sites[:site], plain.sites[site], *real.sites[site + 1 :]))


def trained(config: RunConfig, data: Dataset | None = None, order: int = 0) -> Federation:
    """After all rounds. Another `order` deals the batches anew; initial weights and images stay."""
    federation = Federation.build(config, data)
    federation.engine.setting.seed = config.seed + 1000 * order
    list(federation.rounds())
    return federation


def shared_factors(federation: Federation) -> dict[str, str]:
    """name -> region of every factor that travels while the other one of its layer stays."""
    keys = federation.engine.keys
    pairs = split_pairs(federation.engine.method, keys)
    return {f"{path}.{factor}": keys[f"{path}.{factor}"].region for path, factor in pairs.items()}


def moved(one: Federation, other: Federation, names: Sequence[str]) -> float:
    """||θ - θ'|| / ||θ - θ_0|| over the shared tensors of these names."""
    a, b = (S.pick(federation.server.state, names.__contains__) for federation in (one, other))
    start = S.pick(trainable(one.model), names.__contains__)  # training leaves the model's own tensors alone
    return S.norm(S.sub(a, b)) / S.norm(S.sub(a, start))


def coupling(federation: Federation) -> dict[str, float]:
    """M1 over the steps of one more round, with each site's realised change of the shared factors as its push.

    C: the mean change if all hold the mean private factors. Level: the sites hold each other's.
    """
    engine, server, names = federation.engine, federation.server, shared_factors(federation)
    members, weights = engine.members, [float(len(member.data)) for member in engine.members]
    privates = [member.own(member.memory) for member in members]

    def push(site: int, private: State) -> State:
        begin = server.state | private
        end, _ = members[site].fit(server.round + 1, start=begin)
        return S.sub(S.pick(end, names.__contains__), S.pick(begin, names.__contains__))

    sites, mean = range(len(members)), S.mean(privates, weights)
    pushes = [[push(k, private) for private in privates] for k in sites]
    average = [push(k, mean) for k in sites]
    return {
        "m1_steps": leak_energy([pushes[k][k] for k in sites], average, weights),
        "m1_steps_chance": energy_null(pushes, average, weights),
    }


def measure(config: RunConfig, orders: int = ORDERS) -> dict[str, Any]:
    """The record of one arm and seed: M7 by site, its level by order, both also in encoder and decoder alone."""
    started = perf_counter()
    real, plain = dataset_of(config), unshifted(config)
    own = trained(config, real)
    ends = {
        "m7": [trained(config, without(real, plain, site)) for site in range(len(real.sites))],
        "m7_chance": [trained(config, real, order) for order in range(1, orders + 1)],
    }
    names, found = shared_factors(own), {}
    for region in ("", "encoder", "decoder"):
        of = [name for name in names if region in ("", names[name])]
        for what, others in ends.items():
            key = what.replace("m7", f"m7_{region}") if region else what
            found[key] = [moved(own, other, of) for other in others]
    return {
        "event": "result",
        "config": config.asdict(),
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "sites": {site.name: site.record for site in real.sites},
        "leakage": found | coupling(own),
        "seconds": perf_counter() - started,
    }


def main(path: Path, arms: Mapping[str, dict[str, Any]] = ARMS) -> None:
    """Make the stored records that the file lacks."""
    torch.set_num_threads(1)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for seed in SEEDS:
        for method, change in arms.items():
            config = RunConfig(method, change=change, seed=seed, **SETTINGS)
            if config.asdict() not in [record["config"] for record in records]:
                records.append(measure(config))
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main(records_file())
