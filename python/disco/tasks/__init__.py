"""Tasks: where examples come from, which models fit, the loss and the metric. One file each."""

from disco.tasks.classification import Classification
from disco.tasks.data import DataOptions, Examples, TaskData
from disco.tasks.task import TASKS, DistillOptions, LossOptions, Task, task_named

__all__ = [
    "TASKS",
    "Classification",
    "DataOptions",
    "DistillOptions",
    "Examples",
    "LossOptions",
    "Task",
    "TaskData",
    "task_named",
]
