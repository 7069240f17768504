"""A sparsifier for tests of the loop: one shot of magnitude at the end step, kept from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import disco
from disco.errors import InputError
from disco_kernels.pattern import Pattern


class StandIn:
    """The interface of `disco.sparsify.Sparsifier`, of which it has the magnitude method only."""

    def __init__(
        self,
        nodes: int,
        density: float,
        score: str = "l2",
        method: str = "magnitude",
        allocation: str = "uniform",
        group_size: int = 1,
        begin_step: int = 0,
        end_step: int = 1000,
        every: int = 1,
        **options: Any,
    ) -> None:
        if options:
            raise InputError(f"the method {method} takes no option {', '.join(options)}")
        self.nodes, self.density, self.score, self.group_size = nodes, density, score, group_size
        self.end_step = end_step
        self.steps = 0
        self.masks: dict[str, Tensor] = {}

    @property
    def density_now(self) -> float:
        return self.density if self.masks else 1.0

    def attach(
        self, model: nn.Module, example_inputs: Sequence[Any], optimizer: Optimizer | None = None
    ) -> None:
        self.model, self.example = model, tuple(example_inputs)

    def penalty(self) -> float:
        return 0.0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.end_step:
            self._cut()
        self._apply()

    def finalize(self) -> Pattern:
        return self._cut()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.masks = state["steps"], dict(state["masks"])

    def _cut(self) -> Pattern:
        pattern = disco.sparsify_(
            self.model,
            self.nodes,
            self.density,
            self.example,
            score=self.score,
            group_size=self.group_size,
        )
        named = dict(self.model.named_parameters())
        self.masks = {f"{name}.weight": named[f"{name}.weight"] != 0 for name in pattern.layers}
        return pattern

    def _apply(self) -> None:
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                named[name].masked_fill_(~mask, 0.0)
