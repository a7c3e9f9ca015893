"""How the server combines what travels: one rule a file."""

from fedlora_mini.federation.aggregation.error import aggregation_error
from fedlora_mini.federation.aggregation.mean import mean

__all__ = ["aggregation_error", "mean"]
