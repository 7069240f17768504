"""Run a whole program in plain torch, op by op: the oracle for everything that runs it faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.program.ir import Dtype, Op, Program, Ref, WeightRef, map_leaves
from disco.program.ops import pure_function

Observe = Callable[[Op, tuple[Any, ...]], None]


def interpret(
    program: Program,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Any],
    observe: Observe | None = None,
) -> Any:
    """Outputs of `program` for `inputs`, in the dtype of the weights and inputs that are given.

    Nothing is freed early and nothing is fused: for tests, for folding constants and for looking at
    values, `observe` being called with every op and its arguments.
    """
    if len(inputs) != len(program.inputs):
        raise InputError(f"the program takes {len(program.inputs)} inputs, given {len(inputs)}")
    values: dict[str, Any] = dict(zip(program.inputs, inputs, strict=True))

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.name]
        if isinstance(leaf, WeightRef):
            return weights[leaf.name]
        return dtype_of(leaf) if isinstance(leaf, Dtype) else leaf

    with torch.no_grad():
        for op in program.ops:
            args = map_leaves(op.args, resolve)
            kwargs = {key: map_leaves(value, resolve) for key, value in op.kwargs.items()}
            if observe is not None:
                observe(op, args)
            values[op.name] = pure_function(op.kind)(*args, **kwargs)
    return map_leaves(program.outputs, resolve)


def dtype_of(dtype: Dtype) -> torch.dtype:
    """The torch dtype of this name; InputError for any other attribute of torch."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"{dtype.name!r} is not the name of a torch dtype")
    return found
