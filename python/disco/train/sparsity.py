"""The sparsifier that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disco.errors import InputError
from disco.tasks import Examples, TaskData
from disco.tasks.data import batches_of, order_of
from disco.train.config import TrainConfig
from disco_kernels.pattern import Pattern

# Mean squares of channels are over pixels as well, so few images tell them; all values of a batch
# are in memory at once.
_CALIBRATED = 256
_BATCH = 8


class Sparsifier(Protocol):
    """What the loop calls of `disco.sparsify.Sparsifier`."""

    @property
    def density_now(self) -> float: ...

    @property
    def steps(self) -> int: ...

    def attach(
        self, model: nn.Module, example_inputs: Sequence[Any], optimizer: Optimizer | None = None
    ) -> Any: ...

    def penalty(self) -> Tensor | float: ...

    def step(self) -> None: ...

    def finalize(self) -> Pattern: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def make_sparsifier(config: TrainConfig, total_steps: int) -> Sparsifier | None:
    """None for a dense run. Raises InputError for options that the method does not take."""
    if config.method == "dense":
        return None
    begin_step, end_step, every = config.steps_between(total_steps)
    # Lazily: evaluating a run needs no sparsifier.
    from disco.sparsify import Sparsifier

    made: Sparsifier = Sparsifier(
        nodes=config.nodes,
        density=config.target_density,
        score=config.score,
        method="magnitude" if config.method == "independent" else config.method,
        allocation=config.allocation,
        group_size=config.group_size,
        begin_step=begin_step,
        end_step=end_step,
        every=every,
        **config.method_options,
    )
    return made


def colocated(config: TrainConfig, model: nn.Module, data: TaskData) -> str:
    """Permute the model's channels for the run's nodes and density, in place; what came of it.

    They are weighed as the run's score does: for "activation" by what training images show of them,
    as they are evaluated; for "taylor", whose gradients are not there yet, by "l2".

    Raises:
        InputError: none of the images can be read, or as for `disco.colocate_`.
    """
    from disco.sparsify import colocate_

    size = data.preprocessing.size
    score = "l2" if config.score == "taylor" else config.score
    report = colocate_(
        model,
        config.nodes,
        (torch.zeros(2, 3, size, size),),
        config.target_density,
        score,
        calibration=_calibration(data.train, config.seed) if score == "activation" else None,
        seed=config.seed,
    )
    return f"co-location: {report.summary}"


def _calibration(examples: Examples, seed: int) -> Iterator[tuple[Tensor]]:
    """Batches of images drawn by a seed, not augmented; those that cannot be read are left out,
    since training names them."""
    chosen = order_of(len(examples), seed, 0)[:_CALIBRATED]
    found = 0
    for numbers in batches_of(chosen, _BATCH, drop_last=False):
        images = []
        for number in numbers:
            with suppress(InputError):
                images.append(examples.load(number, None)[0])
        found += len(images)
        if images:
            yield (torch.stack(images),)
    if not found:
        raise InputError(f"none of {len(chosen)} training images could be read: give others")
