"""A new structure from one to ten labelled images: tasks, arms, one run, a comparison."""

from fedlora_mini.experiments.fewshot.arms import ARMS, Arm
from fedlora_mini.experiments.fewshot.run import FewshotConfig, Study, adapt
from fedlora_mini.experiments.fewshot.tasks import TASKS, Task

__all__ = ["ARMS", "TASKS", "Arm", "FewshotConfig", "Study", "Task", "adapt"]
