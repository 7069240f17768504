"""What a task has to offer to be trained and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from disco.errors import InputError
from disco.tasks.classification import Classification
from disco.tasks.data import DataOptions, TaskData
from disco.tasks.detection import Detection
from disco.tasks.options import DistillOptions, LossOptions
from disco.tasks.segmentation import Segmentation
from disco.tasks.super_resolution import SuperResolution

__all__ = ["TASKS", "DistillOptions", "LossOptions", "Meter", "MoreMetrics", "Task", "task_named"]


class Meter(Protocol):
    """A metric over many batches."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch, on any device: a model's outputs, and targets as `collate` made them."""
        ...

    def value(self) -> float:
        """Of all batches so far; larger is better."""
        ...


@runtime_checkable
class MoreMetrics(Protocol):
    """What a meter may have besides."""

    def others(self) -> dict[str, float]:
        """More metrics of all batches so far, by name, for the report."""
        ...


class Task(Protocol):
    """Data, models, loss and metric of one task."""

    @property
    def name(self) -> str:
        """As it is given to `disco train`."""
        ...

    @property
    def metric(self) -> str:
        """The metric's name; larger is better."""
        ...

    def load_data(self, data: str, options: DataOptions) -> TaskData:
        """Read or find examples. Raises InputError."""
        ...

    def build_model(
        self, source: str, name: str, num_classes: int, image_size: int, seed: int
    ) -> nn.Module:
        """A model out of the zoo. Raises InputError."""
        ...

    def collate(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch, a tree of tensors, out of those of its examples."""
        ...

    def loss(self, outputs: Any, targets: Any, options: LossOptions) -> Tensor:
        """A differentiable scalar, the mean over the images; `targets` as `collate` made them."""
        ...

    def distillation(self, outputs: Any, teacher: Any, options: DistillOptions) -> Tensor:
        """A differentiable scalar, 0 where the outputs are the teacher's."""
        ...

    def new_meter(self, classes: Sequence[str]) -> Meter:
        """Measures the metric. Raises InputError if a library that does is not installed."""
        ...


TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), Segmentation(), Detection(), SuperResolution())
}


def task_named(name: str) -> Task:
    """The task. InputError if there is none of this name."""
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}: {', '.join(TASKS)} can be trained")
    return TASKS[name]
