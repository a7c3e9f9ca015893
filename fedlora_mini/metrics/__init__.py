"""What is measured."""

from fedlora_mini.metrics.segmentation import Scores, evaluate, predict, score

__all__ = ["Scores", "evaluate", "predict", "score"]
