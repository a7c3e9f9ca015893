"""Errors that a reader can act on: the thing, the accepted values, the nearest match."""

from collections.abc import Iterable
from difflib import get_close_matches


class FedloraError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback."""


class Diverged(FedloraError):
    """Training left the finite numbers at every client: the rate was too large."""


def unknown(kind: str, name: object, accepted: Iterable[str]) -> FedloraError:
    """The error for a name that is not in a table: `raise unknown("method", "fedid", METHODS)`."""
    names = sorted(accepted)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return FedloraError(f"unknown {kind} '{name}'; accepted: {', '.join(names) or 'none'}.{hint}")
