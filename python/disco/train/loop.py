"""The loop: epochs of steps, a checkpoint after each epoch, the pattern at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from disco.errors import InputError, TrainingError
from disco.tasks import Task, TaskData
from disco.train.batches import Batches, Refused, moved
from disco.train.checkpoint import rng_state, set_rng_state
from disco.train.config import TrainConfig
from disco.train.evaluation import Evaluation, evaluate
from disco.train.files import write_whole
from disco.train.log import Progress, TensorBoard, describe, silent
from disco.train.run_folder import Run
from disco.train.schedule import learning_rate
from disco.train.sparsity import make_sparsifier
from disco.train.wire import make_wire_training

Say = Callable[[str], None]


class Training:
    """One run, from its beginning or a checkpoint to its final weights.

    Args:
        run: its folder.
        task, data: what is learnt from what.
        model: on the CPU; it is moved to `device` and trained in place.
        teacher: imitated, None for none.
        device: to compute on.
        workers: processes that read images.
        say: takes lines.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        data: TaskData,
        model: nn.Module,
        teacher: nn.Module | None,
        device: torch.device,
        workers: int,
        say: Say,
    ) -> None:
        self.run, self.task, self.data = run, task, data
        self.config: TrainConfig = run.config
        self.device, self.workers, self.say = device, workers, say
        self.model = model.to(device)
        self.teacher = None if teacher is None else teacher.to(device).eval().requires_grad_(False)
        self.refused = Refused(say)
        self.batches = Batches(
            data.train, task.collate, self.config.batch_size, self.refused, workers
        )
        self.total_steps = self.config.epochs * len(self.batches)
        self.optimizer = _optimizer(self.model, self.config)
        self.sparsifier = make_sparsifier(self.config, self.total_steps)
        size = data.preprocessing.size
        example = torch.zeros(2, 3, size, size, device=device)
        if self.sparsifier is not None:
            self.sparsifier.attach(self.model, (example,), self.optimizer)
        self.simulation = make_wire_training(self.config, self.total_steps, example)
        if self.simulation is not None:
            self.simulation.check(self.model)
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as plain values and tensors."""
        return {
            "epoch": self.epoch,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": None if self.sparsifier is None else dict(self.sparsifier.state_dict()),
            "rng": rng_state(self.device),
            "rows": self.rows,
            "refused": self.refused.reasons,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.epoch = state["epoch"]
        self.rows = list(state["rows"])
        self.refused.reasons.update(state["refused"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        set_rng_state(state["rng"], self.device)

    def finish(self) -> Evaluation:
        """Train what is left, write the final weights, and evaluate them.

        Raises:
            TrainingError: the loss is no number, or a file cannot be written. The last checkpoint
                stays.
            InputError: no image can be read, or the model's outputs do not fit the task.
        """
        if self.rows:
            self.run.save_metrics(self.rows)  # it may have been killed between both files
        board = TensorBoard(self.run.path / "tensorboard", self.epoch, self.say)
        try:
            while self.epoch < self.config.epochs:
                row = self._epoch()
                self.run.save_checkpoint(self.epoch, self.state())
                self.run.save_metrics(self.rows)
                board.add(row)
                self.say(describe(row, self.config.epochs, self.task.metric))
        finally:
            board.close()
        return self._end()

    def _epoch(self) -> dict[str, Any]:
        begin = time.perf_counter()
        progress = Progress(self.config.epochs, len(self.batches))
        losses, images, lr = 0.0, 0, 0.0
        self.model.train()
        for number, (inputs, targets) in enumerate(
            self.batches.shuffled(self.config.seed, self.epoch)
        ):
            if len(inputs) < 2 and number:
                continue  # what is left of a batch of unreadable images; batch norm needs two
            lr = self._set_lr(self.epoch * len(self.batches) + number)
            loss = self._step(inputs.to(self.device), moved(targets, self.device), number)
            losses, images = losses + loss * len(inputs), images + len(inputs)
            progress.at(self.epoch, number, loss)
        progress.end()
        if not images:
            raise InputError(
                f"none of {len(self.refused)} training images could be read: give others"
            )
        self._check_finite()
        due = (self.epoch + 1) % self.config.evaluate_every == 0
        metric = self._evaluate(others=False).value if due else None
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "step": self.epoch * len(self.batches),
            "loss": losses / images,
            self.task.metric: metric,
            "lr": lr,
            "density": 1.0 if self.sparsifier is None else float(self.sparsifier.density_now),
            "images": images,
            "refused": len(self.refused),
            "seconds": round(time.perf_counter() - begin, 3),
        }
        self.rows.append(row)
        return row

    def _step(self, inputs: Tensor, targets: Any, number: int) -> float:
        """One update; the loss that led to it."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast(), self._simulated(number):
            outputs = self.model(inputs)
        loss = self.task.loss(outputs, targets, self.config.loss_options)
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                taught = self.teacher(inputs)
            weight = self.config.distill_weight
            imitation = self.task.distillation(outputs, taught, self.config.distill_options)
            loss = (1 - weight) * loss + weight * imitation
        if self.sparsifier is not None:
            loss = loss + self.sparsifier.penalty()
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise self._diverged(f"the loss is {value}", f"step {number + 1}")
        loss.backward()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        return value

    def _set_lr(self, step: int) -> float:
        warmup = round(self.config.warmup_epochs * len(self.batches))
        lr = learning_rate(step, self.total_steps, warmup, self.config.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _evaluate(self, others: bool) -> Evaluation:
        self.model.eval()
        first = self.epoch < self.config.evaluate_every
        return evaluate(
            self.model,
            self.task,
            self.data.val,
            self.data.classes,
            self.say if first else silent,  # the same images are refused every epoch
            batch_size=self.config.batch_size,
            workers=self.workers,
            device=self.device,
            data=f"{self.data.text}; val",
            others=others,
        )

    def _end(self) -> Evaluation:
        if self.sparsifier is not None:
            pattern = self.sparsifier.finalize()
            write_whole(self.run.pattern, pattern.save)
        if self.simulation is not None:
            self.simulation.attach(self.model)
        result = self._evaluate(others=True)
        if self.simulation is not None:
            self.simulation.detach()
        self.run.save_final(self.model)
        return result

    def _check_finite(self) -> None:
        """So that a checkpoint never holds a model that is lost."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise self._diverged(f"{name} has values that are no numbers", "its end")

    def _diverged(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"training diverged: {what} in epoch {self.epoch + 1}, {where}. The last checkpoint, "
            f"after epoch {self.epoch}, stays; begin again in another folder with a lower --lr, a "
            "longer --warmup-epochs or --clip-norm"
        )

    def _simulated(self, number: int) -> AbstractContextManager[None]:
        """What nodes do, around the forward pass of step `number` of the epoch."""
        if self.simulation is None:
            return nullcontext()
        step = self.epoch * len(self.batches) + number
        return self.simulation.step(
            self.model, step if self.sparsifier is None else self.sparsifier.steps
        )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            yield


def _optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True)
    return AdamW(groups, lr=config.peak_lr)
