"""Differential privacy: what no single sample, or no single client, can move by much."""

from fedlora_mini.privacy.clip import clip_sum, norms

__all__ = ["clip_sum", "norms"]
