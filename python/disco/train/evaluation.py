"""The metric of a model, or of anything that answers like one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.tasks import Examples, MoreMetrics, Task, made_harder, task_named
from disco.train.batches import Batches, Refused, moved
from disco.train.run_folder import Run

SPLITS = ("val", "train")
_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """A metric and what it was measured on.

    Attributes:
        metric: its name.
        value: in the metric's own unit; larger is better.
        images: evaluated.
        refused: images that could not be read, and do not count.
        data: where the images are from, in words.
        others: more metrics, by name; see `disco.tasks.MoreMetrics`.
    """

    metric: str
    value: float
    images: int
    refused: int
    data: str
    others: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = f" ({self.refused} could not be read)" if self.refused else ""
        others = "".join(f", {name} {value:.4f}" for name, value in self.others.items())
        return f"{self.metric} {self.value:.4f}{others} on {self.images} images{left_out}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Any],
    task: Task,
    examples: Examples,
    classes: Sequence[str],
    say: Callable[[str], None],
    *,
    batch_size: int = _BATCH,
    workers: int = 0,
    device: torch.device | str = "cpu",
    data: str = "",
    others: bool = True,
) -> Evaluation:
    """Ask for the outputs of all examples, unchanged, and measure them.

    Args:
        predict: inputs float32 [B, 3, s, s] on `device` to outputs; a model has to be in `eval()`.
        task: whose metric it is.
        examples: to evaluate on.
        classes: their names.
        say: takes a line for each image that cannot be read.
        batch_size, workers: of reading.
        device: where inputs go.
        data: where the examples are from, for the result.
        others: measure the task's other metrics, too.

    Raises:
        InputError: not one example could be read.
    """
    refused = Refused(say)
    meter = task.new_meter(classes)
    images = 0
    batches = Batches(examples, task.collate, batch_size, refused, workers)
    for inputs, targets in batches.in_order():
        meter.update(predict(inputs.to(device)), moved(targets, device))
        images += len(inputs)
    if not images:
        raise InputError(f"none of {len(refused)} images could be read: give others")
    more = meter.others() if others and isinstance(meter, MoreMetrics) else {}
    return Evaluation(task.metric, meter.value(), images, len(refused), data, more)


def evaluate_run(
    run: Run,
    say: Callable[[str], None],
    *,
    data: str | None = None,
    split: str = "val",
    predict: Callable[[Tensor], Any] | None = None,
    batch_size: int = _BATCH,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """The metric of a finished run's model on its own validation examples, or on others.

    Args:
        run: a finished one.
        say: takes lines.
        data: as for training; None for the run's own. Its classes have to be the run's.
        split: "val" or "train", which is not augmented here.
        predict: answers in place of the model: the ranks of its partition.
        batch_size, workers, device: as for `evaluate`.

    Raises:
        InputError: an unfinished run, or data that do not fit.
    """
    run.require_finished()
    if split not in SPLITS:
        raise InputError(f"split is one of {', '.join(SPLITS)}; given {split!r}")
    task = task_named(run.config.task)
    options = replace(run.config.data_options, preprocessing=run.preprocessing)
    found = made_harder(task.load_data(data or run.config.data, options), options)
    if found.classes != run.classes:
        odd = sorted(set(found.classes) ^ set(run.classes))
        raise InputError(
            f"the data have other classes than the run in {run.path} ({', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''}): give data with its {len(run.classes)} classes"
        )
    if predict is None:
        predict = run.load_model().to(device)
    return evaluate(
        predict,
        task,
        found.val if split == "val" else found.train,
        found.classes,
        say,
        batch_size=batch_size,
        workers=workers,
        device=device,
        data=f"{found.text}; {split}",
    )
