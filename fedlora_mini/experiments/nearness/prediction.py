"""From the updates to a prediction: who should share what, which of four arms is best, and whether it was so.

The arms are the four ways to share one factor in the encoder and one in the decoder, with the head at the site. What a
factor costs in a layer is what the updates lose if it is common, beyond what they lose at rank r with both factors at
the site (`updates.sharing_errors`); a region's cost is the mean over its layers, an arm's the sum of its two regions'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.report import Result, arms, table_of
from fedlora_mini.experiments.stats import Difference, bootstrap, interval, paired_difference

Table = NDArray[np.float64]
REGIONS = ("encoder", "decoder")
ARM_OF = {  # (factor shared in the encoder, in the decoder) -> row of the method table
    ("A", "A"): "fedsa",
    ("B", "B"): "inverse_fedsa",
    ("B", "A"): "iat_own_head",
    ("A", "B"): "anti_own_head",
}


@dataclass(frozen=True)
class Lean:
    """By how much one A costs a region more than one B, with a 95 % interval over seeds and layers."""

    margin: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.margin:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def factor(self) -> str | None:
        """The one to share; None if the interval holds zero."""
        return "B" if self.low > 0 else "A" if self.high < 0 else None


@dataclass(frozen=True)
class Prediction:
    """`leans` by region; `cost` of each arm, in shares of the updates' energy."""

    leans: dict[str, Lean]
    cost: dict[str, float]

    @property
    def best(self) -> str:
        return min(self.cost, key=lambda arm: self.cost[arm])

    @property
    def assignment(self) -> str | None:
        """The arm whose factors both regions lean to; None if a region leans to neither."""
        return ARM_OF.get((self.leans["encoder"].factor or "", self.leans["decoder"].factor or ""))


def costs(records: Sequence[Result], region: str, factor: str, start: str = "dense") -> Table:
    """(seeds, layers): what sharing `factor` loses beyond what rank r does."""
    rows = [
        [layer[start][factor] - layer[start]["own"] for layer in r["layers"].values() if layer["region"] == region]
        for r in sorted(records, key=lambda r: r["config"]["seed"])
        if all(start in layer for layer in r["layers"].values())
    ]
    if not rows or not rows[0]:
        raise FedloraError(f"no record holds updates '{start}' of the {region}")
    return np.array(rows)


def margins(records: Sequence[Result], region: str, start: str = "dense") -> Table:
    """(seeds, layers): how much more one A costs than one B."""
    return costs(records, region, "A", start) - costs(records, region, "B", start)


def lean(records: Sequence[Result], region: str, null: Table | float = 0.0, start: str = "dense") -> Lean:
    """`Lean` of a region, beyond the margins of a `null`.

    null: `margins` of the same seeds where sites do not differ (start "dealt", or the phantom without a shift). What
    layers' shapes and a common task prefer is then taken away, and what the sites' differences prefer is left.
    """
    d = margins(records, region, start) - null
    return Lean(float(d.mean()), *interval(d))


def expect(
    records: Sequence[Result], a: str, b: str, null: Mapping[str, Table | float] | None = None, start: str = "dense"
) -> Lean:
    """By how much arm b costs more than arm a, as a `Lean`: positive where a is predicted to be the better one.

    null: region -> the margins to take away, as in `lean`. Layers are drawn for each region by itself.
    """
    factor = {arm: factors for factors, arm in ARM_OF.items()}
    total, draws = 0.0, np.zeros(1)
    for place, region in enumerate(REGIONS):
        sign = {("B", "A"): +1, ("A", "B"): -1}.get((factor[a][place], factor[b][place]), 0)
        d = sign * (margins(records, region, start) - (null or {}).get(region, 0.0))
        total, draws = total + float(d.mean()), draws + bootstrap(d, seed=place)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Lean(total, float(low), float(high))


def predict(records: Sequence[Result], start: str = "dense") -> Prediction:
    """What the records of one data set and network, one a seed, predict."""
    cost = {(region, f): float(costs(records, region, f, start).mean()) for region in REGIONS for f in ("A", "B")}
    total = {arm: cost["encoder", enc] + cost["decoder", dec] for (enc, dec), arm in ARM_OF.items()}
    return Prediction({region: lean(records, region, start=start) for region in REGIONS}, total)


def effects(tables: Mapping[str, Table]) -> dict[str, Difference]:
    """Region -> what sharing B instead of A there was worth, over both choices in the other region.

    tables: arm -> scores (seeds, sites), higher is better, of all four arms, paired.
    """
    if missing := [arm for arm in ARM_OF.values() if arm not in tables]:
        raise FedloraError(f"the four arms of the 2x2 are needed, missing: {', '.join(missing)}")
    fedsa, inverse, iat, anti = (tables[arm] for arm in ARM_OF.values())
    return {
        "encoder": paired_difference((iat + inverse) / 2, (fedsa + anti) / 2),
        "decoder": paired_difference((anti + inverse) / 2, (fedsa + iat) / 2),
    }


def _lean(seen: Difference) -> Lean:
    return Lean(seen.mean, seen.low, seen.high)


def tables_of(results: Sequence[Result], protocol: str = "personal") -> dict[str, Table]:
    """The tables of a results file that `check` takes; other arms are left out."""
    return {arm: table_of(results, arm, protocol) for arm in arms(results) if arm in ARM_OF.values()}


def check(prediction: Prediction, tables: Mapping[str, Table]) -> dict[str, Any]:
    """Region -> "held", "failed" (the opposite was seen), "open" (an interval holds zero) or "no prediction".

    And the best arm predicted and seen, and Kendall's tau between the four arms' costs and losses in score: 1 is the
    same order, -1 the opposite one, and with four arms only these two have a chance below 0.05 (one in 24).
    """
    found, out = effects(tables), dict[str, Any]()
    for region, seen in found.items():
        wanted, shown = prediction.leans[region].factor, _lean(seen).factor
        out[region] = "held" if wanted == shown else "failed"
        if None in (wanted, shown):
            out[region] = "no prediction" if wanted is None else "open"
    means = {arm: float(np.mean(tables[arm])) for arm in ARM_OF.values()}
    tau = kendalltau([prediction.cost[arm] for arm in means], [-mean for mean in means.values()]).statistic
    return out | {
        "effects": found,
        "best predicted": prediction.best,
        "best seen": max(means, key=lambda arm: means[arm]),
        "tau": float(tau),
    }
