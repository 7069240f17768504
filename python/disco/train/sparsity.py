"""The sparsifier that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disco.train.config import TrainConfig
from disco_kernels.pattern import Pattern


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


def colocated(config: TrainConfig, model: nn.Module, image_size: int) -> str:
    """Permute the model's channels for the run's nodes and density, in place; what came of it."""
    from disco.sparsify import colocate_

    report = colocate_(
        model,
        config.nodes,
        (torch.zeros(2, 3, image_size, image_size),),
        config.target_density,
        config.score if config.score == "l1" else "l2",
        seed=config.seed,
    )
    return f"co-location: {report.summary}"
