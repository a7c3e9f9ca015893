"""What a comparison compares: a row of the method table, or `row:name=value,name=value`, the row with other numbers."""

import json
from collections.abc import Mapping
from typing import Any

from fedlora_mini.errors import FedloraError
from fedlora_mini.federation import METHODS


def value(text: str) -> Any:
    """A JSON value if it is one, else the text: 1.5, true, [1, 2], hello."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    """ "resfim:score=lottery,tau=0.1" -> ("resfim", {"score": "lottery", "tau": 0.1})."""
    name, colon, rest = text.partition(":")
    change: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, found, given = part.partition("=")
        if not (key and found and given) or key in change:
            raise FedloraError(f"arm '{text}' is not understood; accepted: a method, or METHOD:NAME=VALUE,NAME=VALUE")
        change[key] = value(given)
    return name, change


def arm_of(config: Mapping[str, Any]) -> str:
    """The arm of a run, from its stored configuration: method and changes, these in the order of their names."""
    change = config.get("change") or {}
    told = ",".join(
        f"{name}={given if isinstance(given, str) else json.dumps(given)}" for name, given in sorted(change.items())
    )
    return f"{config['method']}:{told}" if told else config["method"]


def title_of(arm: str) -> str:
    """An arm's name for the reader."""
    name, _, told = arm.partition(":")
    return f"{METHODS[name].title} ({told.replace(',', ', ')})" if told else METHODS[name].title
