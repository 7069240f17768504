"""What a layer's outputs lose without a channel, as inputs that a model is used with show it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from disco.capture import Captured
from disco.errors import InputError
from disco.partition.planner import MATRIX_OPS
from disco.program import Op, WeightRef, flatten_inputs
from disco.program.interpret import interpret
from disco.sparsify.groups import Group
from disco.sparsify.lost_score import Floats


def output_energies(
    captured: Captured, groups: Sequence[Group], calibration: Iterable[Sequence[Any]]
) -> dict[str, Floats]:
    """By parameter ``[O, I]``: the mean square of what an input channel adds to an output.

    That is, over the kernel, the squares of the weights times the mean square of the channel over
    images and pixels (or tokens). Weights are those of the captured program: a batch norm that
    follows a convolution is folded into them, so an output counts as the norm scales it. Added
    up over channels it is what the output loses without them, if channels and the taps of a kernel
    are uncorrelated and all pixels of the input count alike. A parameter that several layers share
    has the sum of theirs.

    Args:
        captured: the model, which is run in evaluation mode.
        groups: whose parameters are wanted.
        calibration: batches, each the model's inputs by position, like the example's.

    Raises:
        InputError: no batch, one that the model does not take, or values that are not finite.
    """
    wanted = {name for group in groups for name in group.out_ownership}
    means = _InputSquares(captured, wanted)
    for batch in calibration:
        means.add(batch)
    found: dict[str, Floats] = {}
    for op in means.layers:
        weight = captured.weights[_weight(op)].double()
        squares = weight.reshape(*weight.shape[:2], -1).square().sum(2)
        energies = np.asarray((squares * means.of(op)).numpy(), dtype=np.float64)
        name = captured.raw_name(_weight(op))
        found[name] = found[name] + energies if name in found else energies
    return found


class _InputSquares:
    """Mean squares of the inputs of layers, channel by channel."""

    def __init__(self, captured: Captured, wanted: set[str]) -> None:
        self._captured = captured
        self.layers = [
            op
            for op in captured.program.ops
            if op.kind in MATRIX_OPS
            and isinstance(op.args[1], WeightRef)
            and captured.raw_name(op.args[1].name) in wanted
        ]
        self._names = {op.name for op in self.layers}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(self._names, 0)

    def add(self, batch: Sequence[Any]) -> None:
        """Run a batch."""
        if not isinstance(batch, (tuple, list)):
            raise InputError(
                f"a batch of calibration is a tuple of the model's inputs, e.g. (x,); given "
                f"{type(batch).__name__}: give calibration=[(x,)]"
            )
        program = self._captured.program
        inputs = flatten_inputs(program.signature, program.inputs, batch, {})
        self._check(inputs)
        interpret(program, self._captured.weights, [x.cpu() for x in inputs], self._observe)

    def of(self, op: Op) -> Tensor:
        """Float64 ``[I]``."""
        if not self._counts[op.name]:
            raise InputError(
                "score 'activation' needs calibration inputs, and there was no batch: give "
                "calibration=[(x,)] with inputs that the model is used with"
            )
        if not bool(self._sums[op.name].isfinite().all()):
            name = self._captured.raw_name(_weight(op))
            raise InputError(
                f"what {name!r} reads of the calibration inputs is "
                "not finite: give finite inputs, or weights from before training diverged"
            )
        return self._sums[op.name] / self._counts[op.name]

    def _observe(self, op: Op, args: tuple[Any, ...]) -> None:
        if op.name not in self._names:
            return
        x: Tensor = args[0].detach().double()
        x = x.movedim(1 if op.kind == "disco.conv2d" else -1, -1).flatten(0, -2)
        total = x.square().sum(0)
        self._sums[op.name] = self._sums[op.name] + total if self._counts[op.name] else total
        self._counts[op.name] += len(x)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """That shapes and dtypes are those captured; the batch is free."""
        program = self._captured.program
        for name, x in zip(program.inputs, inputs, strict=True):
            info = program.values[name]
            same = len(info.shape) == x.dim() and all(
                isinstance(want, str) or want == size
                for want, size in zip(info.shape, x.shape, strict=True)
            )
            if not same or f"torch.{info.dtype}" != str(x.dtype) or not len(x):
                raise InputError(
                    f"the calibration input {name!r} is {x.dtype} {list(x.shape)}, and the example "
                    f"was {info.dtype} {list(info.shape)}: give inputs of the example's size and "
                    "dtype, one or more"
                )


def _weight(op: Op) -> str:
    weight = op.args[1]
    assert isinstance(weight, WeightRef)
    return weight.name
