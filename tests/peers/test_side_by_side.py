"""The part of a stored line that needs Flower and no network: what one message costs a process of its own."""

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.slow]
pytest.importorskip("flwr", reason="flwr is not installed here: run `make peers`")

from fedlora_mini.experiments.config import RunConfig  # noqa: E402
from fedlora_mini.experiments.side_by_side import TINY, message_seconds  # noqa: E402


def test_the_parts_of_a_message_are_positive_and_starting_costs_more_than_building():
    parts = message_seconds(RunConfig(method="iat", **TINY))
    assert list(parts) == ["start", "site", "loading", "training"] and min(parts.values()) > 0
    assert parts["start"] > parts["site"]
