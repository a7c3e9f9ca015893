"""What a run promises to one image or to one client, what is spent of it, and the round that it does not allow."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.experiments.config import RunConfig
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.aggregation.private import ClientDP
from fedlora_mini.federation.guarding import Guarding
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Method
from fedlora_mini.privacy import DPSGD, Release, epsilon


def look_at_delta(delta: float, n: int, who: str) -> None:
    """Warn where delta >= 1/n: to publish one of n, drawn at random, is (0, 1/n)-private and protects nobody."""
    if delta * n >= 1:
        warnings.warn(
            f"delta {delta:g} protects nobody among {n} {who}: to publish one of them at random would be as private; "
            f"take one far below 1/{n}",
            stacklevel=3,
        )


def guard_of(config: RunConfig, images: Sequence[int]) -> Guarding | None:
    """Privacy of every image, for clients with so many. All draw at one rate; their mean batch is the config's.

    The noise is calibrated to the client that takes part most often, which is known beforehand: participants are drawn
    by the seed, whatever the data. Warns of a delta that is too large for the smallest client.
    """
    if not config.private or config.unit != "image":
        return None
    look_at_delta(config.delta, min(images), "images of a client")
    clients = list(range(len(images)))
    asked = [k for t in range(1, config.rounds + 1) for k in config.chosen(clients, t)]
    most = max(asked.count(client) for client in clients)
    return config.guard(min(1.0, config.batch * len(images) / sum(images)), most * config.steps)


def with_client_privacy(row: Method, config: RunConfig, clients: int) -> Method:
    """The row with clipped changes and noise in the place of FedAvg's mean, if clients are what is to be protected.

    Warns of a delta that is too large for so few clients. Raises for a row with another rule or with messages, and what
    `ClientDP` and the calibration raise.
    """
    if not config.private or config.unit != "client":
        return row
    if row.rule is not mean or row.work.messages:
        raise FedloraError(
            f"'{row.title}': privacy of clients is a mean of clipped changes; its rule is another, or it tells more"
        )
    look_at_delta(config.delta, clients, "clients")
    sigma, expected = config.noise(config.fraction, config.rounds), config.fraction * clients
    drawing, how = (config.seed, config.secure), config.clipping
    return replace(row, rule=ClientDP(sigma, expected, config.clip, config.quantile, 0.2, *drawing, how))


@dataclass(frozen=True)
class Promise:
    """The run's budget, over its clients' ledgers or the server's rounds."""

    config: RunConfig
    method: Method
    members: Sequence[Member]

    def releases(self, rounds: int) -> list[list[Release]]:
        """What each account has released once so many rounds are over: the clients' ledgers, or the server's one."""
        if isinstance(self.method.rule, ClientDP):
            return [[Release(self.method.rule.sigma, self.config.fraction, rounds)]]
        return [member.ledger.releases for member in self.members if member.ledger is not None]

    def refuses(self, round: int) -> str:
        """Why the round must not happen; empty if it may."""
        config, guard = self.config, self.members[0].setting.guard
        if config.epsilon is None or round > config.rounds:
            return ""
        if guard is None:
            accounts = {"the server": self.releases(round)[0]}
        else:
            chosen = config.chosen([m.number for m in self.members], round)
            more = guard.releases(config.steps)
            asked = [m for m in self.members if m.number in chosen]
            accounts = {f"client {m.number}": [*m.ledger.releases, more] for m in asked if m.ledger is not None}
        for name, account in accounts.items():
            if (total := epsilon(account, config.delta, config.accountant)) > config.epsilon:
                return f"round {round} would spend epsilon {total:.4g} of {config.epsilon:g} at {name}"
        return ""

    def told(self, rounds: int) -> dict[str, Any]:
        """For the record: epsilon, with every number that it depends on; nothing where nothing was asked for.

        Where more was told than private gradients, epsilon is inf, and "not_dp" says why.
        """
        config, rule, guard = self.config, self.method.rule, self.members[0].setting.guard
        if not config.private:
            return {}
        used: ClientDP | DPSGD
        accounts = self.releases(rounds)
        if guard is None:
            assert isinstance(rule, ClientDP)
            used, q, unit = rule, config.fraction, "one client more or less"
        else:
            used, q, unit = guard.mechanism, guard.mechanism.q, "one image more or less at one client"
        why = "" if guard is None else guard.not_dp(self.method)
        spent = math.inf if why else max(epsilon(account, config.delta, config.accountant) for account in accounts)
        how = {"clip": used.C, "clipping": used.clipping, "secure": config.secure}
        promise = {"delta": config.delta, "accountant": config.accountant, "epsilon": spent}
        counts = [sum(release.times for release in account) for account in accounts]
        return {
            "privacy": {"sigma": used.sigma, "q": q, "unit": unit}
            | how
            | promise
            | ({"not_dp": why} if why else {})
            | {"releases": counts, "stopped": self.refuses(rounds + 1)}
        }
