"""What values a program's convolutions and linears read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from disco.errors import InputError
from disco.program.interpret import interpret
from disco.program.ir import Op, Program

Range = tuple[float, float]


def input_ranges(
    program: Program,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    names: Collection[str],
) -> dict[str, Range]:
    """Lowest and highest value of the first argument of each of these ops.

    Args:
        program, weights: in float32.
        inputs: examples of what the program will be given.
        names: of the values that the ops compute.

    Raises:
        InputError: a range that is not finite, or no value to take one from.
    """
    found: dict[str, Range] = {}

    def look(op: Op, args: tuple[Any, ...]) -> None:
        if op.name not in names:
            return
        if args[0].numel() == 0:
            raise InputError(f"the example inputs leave {op.name!r} ({op.kind}) nothing to read")
        low, high = (float(bound) for bound in args[0].aminmax())
        if not (-float("inf") < low <= high < float("inf")):  # also if either is NaN
            raise InputError(
                f"with the example inputs {op.name!r} ({op.kind}) reads {low} to {high}: give "
                "examples whose values stay finite"
            )
        found[op.name] = (low, high)

    interpret(program, weights, inputs, look)
    return found
