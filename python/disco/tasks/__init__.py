"""Tasks: where examples come from, which models fit, the loss and the metric. One file each."""

from disco.tasks.classification import Classification
from disco.tasks.data import DataOptions, Example, Examples, TaskData, made_harder
from disco.tasks.detection import Detection
from disco.tasks.segmentation import Segmentation
from disco.tasks.super_resolution import SuperResolution
from disco.tasks.task import (
    TASKS,
    DistillOptions,
    LossOptions,
    Meter,
    MoreMetrics,
    Task,
    task_named,
)

__all__ = [
    "TASKS",
    "Classification",
    "DataOptions",
    "Detection",
    "DistillOptions",
    "Example",
    "Examples",
    "LossOptions",
    "Meter",
    "MoreMetrics",
    "Segmentation",
    "SuperResolution",
    "Task",
    "TaskData",
    "made_harder",
    "task_named",
]
