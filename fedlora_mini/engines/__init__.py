"""Where clients run."""

from fedlora_mini.engines.local import LocalEngine

__all__ = ["LocalEngine"]
