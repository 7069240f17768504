"""Beginning a run, and going on with one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disco.errors import InputError
from disco.tasks import Task, TaskData, made_harder, task_named
from disco.train.config import TrainConfig
from disco.train.device import describe_device, training_device
from disco.train.evaluation import Evaluation
from disco.train.loop import Training
from disco.train.run_folder import Run, check_new, open_run, weights_of
from disco.train.sparsity import colocated
from disco.zoo import build_model

Say = Callable[[str], None]


def train(
    config: TrainConfig, out: Path, say: Say = print, *, device: str = "cpu", workers: int = 0
) -> Evaluation:
    """Train a model in a new folder.

    Args:
        config: what to do.
        out: must not exist, or be an empty folder.
        say: takes lines.
        device: "cpu", "cuda" or "cuda:1".
        workers: processes that read images; 0 reads them in this one.

    Returns:
        The metric of the final weights on the validation examples.

    Raises:
        InputError: something given does not fit; no folder is made then.
        TrainingError: see `Training.finish`.
    """
    found = training_device(device, config.amp)
    _check_workers(workers)
    check_new(out)
    task = task_named(config.task)
    data = made_harder(task.load_data(config.data, config.data_options), config.data_options)
    model = _first_model(config, task, data, say)
    teacher = _teacher(config, data)
    _check_fits(model, task, config, data)
    run = Run(out, config, data.classes, data.preprocessing, describe_device(found))
    say(data.text)
    with _random(config.seed, found):
        training = Training(run, task, data, model, teacher, found, workers, say)
        with run.made():
            return training.finish()


def resume(
    out: Path,
    given: Mapping[str, Any] | None = None,
    say: Say = print,
    *,
    device: str = "cpu",
    workers: int = 0,
) -> Evaluation:
    """Go on with a run from its last whole checkpoint, or from its beginning if there is none.

    On the CPU with one thread, the result is that of the run without interruption, bit for bit.

    Args:
        out: the run's folder.
        given: settings that the caller names again; they have to be the run's.
        say, device, workers: as for `train`.

    Raises:
        InputError: no run, a finished one, other settings, or data that changed.
        TrainingError: see `Training.finish`.
    """
    run = open_run(out)
    for name, value in (given or {}).items():
        if value != getattr(run.config, name):
            raise InputError(
                f"{name} {value!r} was given, and the run in {out} has "
                f"{getattr(run.config, name)!r}: leave it out to go on with that, or begin a new "
                "run"
            )
    if run.is_finished:
        raise InputError(f"the run in {out} is finished: see `disco evaluate {out}`")
    found = training_device(device, run.config.amp)
    _check_workers(workers)
    task = task_named(run.config.task)
    options = replace(run.config.data_options, preprocessing=run.preprocessing)
    data = made_harder(task.load_data(run.config.data, options), options)
    if data.classes != run.classes:
        raise InputError(
            f"the classes of {run.config.data} are not those that the run in {out} began with: "
            "restore the data, or begin a new run"
        )
    begun = bool(run.checkpoints())
    model = run.new_model() if begun else _first_model(run.config, task, data, say)
    teacher = _teacher(run.config, data)
    say(data.text)
    with run.locked(), _random(run.config.seed, found):
        training = Training(run, task, data, model, teacher, found, workers, say)
        state, damaged = run.newest_checkpoint()
        for line in damaged:
            say(f"left out: {line}")
        if state is not None:
            training.load(state)
            say(f"going on after epoch {training.epoch} of {run.config.epochs}")
        return training.finish()


@contextmanager
def _random(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators begin at `seed`, and are the caller's again afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _first_model(config: TrainConfig, task: Task, data: TaskData, say: Say) -> nn.Module:
    size, classes = data.preprocessing.size, len(data.classes)
    if config.init is None:
        return task.build_model(config.source, config.model_name, classes, size, config.seed)
    model = build_model(
        config.source,
        config.model_name,
        weights=weights_of(config.init),
        seed=config.seed,
        num_classes=classes,
        image_size=size,
    )
    if config.colocate:
        say(colocated(config, model, data))
    return model


def _teacher(config: TrainConfig, data: TaskData) -> nn.Module | None:
    if config.teacher is None:
        return None
    run = open_run(Path(config.teacher))
    if (run.classes, run.preprocessing) != (data.classes, data.preprocessing):
        raise InputError(
            f"the teacher in {config.teacher} learnt from other classes or inputs of another "
            f"preparation ({len(run.classes)} classes, {run.preprocessing.size} pixels) than this "
            f"run ({len(data.classes)}, {data.preprocessing.size}): give one trained on the same "
            "data"
        )
    return run.load_model()


def _check_fits(model: nn.Module, task: Task, config: TrainConfig, data: TaskData) -> None:
    """Try a batch on a copy, so that what does not fit is said before anything is made."""
    size = data.preprocessing.size
    tried = copy.deepcopy(model).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            outputs = tried(torch.rand(2, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{config.model} cannot be trained on images of {size} x {size} pixels ({reason}): "
                "choose another --image-size or model"
            ) from error
        # The outputs' form is tried on the first two targets that can be read; none says nothing.
        targets = _first_targets(data)
        if len(targets) == 2:
            task.loss(outputs, task.collate(targets), config.loss_options)


def _first_targets(data: TaskData) -> list[Any]:
    targets: list[Any] = []
    for index in range(min(len(data.train), _TRIED)):
        with suppress(InputError):
            targets.append(data.train.load(index, None)[1])
        if len(targets) == 2:
            break
    return targets


_TRIED = 16


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise InputError(f"{workers} workers were given: give 0 or more")
