"""Training for what nodes do: rounded payloads, and steps in which one of them is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disco.sparsify import WireSimulation
from disco.train.config import TrainConfig
from disco.train.run_folder import Run


class WireTraining:
    """The simulation that a run's settings ask for, from the step on at which masks are final.

    The lost nodes are drawn from torch's generator on the CPU, whose state is in checkpoints.

    Args:
        config: of the run.
        total_steps: that it has.
        example: inputs of the model, two or more images of its device.
    """

    def __init__(self, config: TrainConfig, total_steps: int, example: Tensor) -> None:
        self._simulation = WireSimulation(
            config.nodes, config.wire_dtype, survivable=config.node_dropout > 0
        )
        self._dropout, self._example = config.node_dropout, example
        _, self._begin_step, _ = config.steps_between(total_steps)

    def check(self, model: nn.Module) -> None:
        """Raise InputError unless the model can be simulated; it is not changed."""
        training = model.training
        self.attach(model.train())
        self.detach()
        model.train(training)

    def attach(self, model: nn.Module) -> None:
        """Simulate from now on, unless it does already."""
        if not self._simulation.attached:
            self._simulation.attach(model, (self._example,))

    def detach(self) -> None:
        self._simulation.detach()

    @contextmanager
    def step(self, model: nn.Module, done: int) -> Iterator[None]:
        """Around the forward pass of a step after `done` others."""
        if done < self._begin_step:
            yield
            return
        self.attach(model)
        lost = []
        if self._dropout and float(torch.rand(())) < self._dropout:
            lost = [int(torch.randint(self._simulation.world_size, ()))]
        with self._simulation.without(lost):
            yield


def make_wire_training(
    config: TrainConfig, total_steps: int, example: Tensor
) -> WireTraining | None:
    """None where nothing is to be simulated."""
    if config.wire_dtype == "float32" and not config.node_dropout:
        return None
    return WireTraining(config, total_steps, example)


def simulated(
    run: Run, wire_dtype: str, lost: Sequence[int], device: torch.device
) -> Callable[[Tensor], Any]:
    """What the nodes of a finished run's model would answer.

    Args:
        run: a finished one; its setting `nodes` says how many there are. Where it was trained to
            lose nodes, their plan is one that can.
        wire_dtype: of payloads.
        lost: ranks that are not there.
        device: to compute on.

    Raises:
        InputError: an unfinished run, a model that cannot be simulated, ranks that do not exist.
    """
    survivable = bool(lost) or run.config.node_dropout > 0
    simulation = WireSimulation(run.config.nodes, wire_dtype, survivable=survivable)
    simulation.lost = lost
    model, size = run.load_model().to(device), run.preprocessing.size
    simulation.attach(model, (torch.zeros(2, 3, size, size, device=device),))
    return model
