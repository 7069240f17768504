"""The same program computing in another floating dtype, with float32 inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disco.program.ir import Dtype, Op, Program, Ref, ValueInfo, WeightRef, leaves, map_leaves

_FULL = "float32"
_CAST = "aten.to.dtype"


def lower_precision(
    program: Program, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Program, dict[str, Tensor]]:
    """Inputs are cast as they come in, outputs back to float32; all between is in ``dtype``.

    Args:
        program, weights: what is float32 in them becomes ``dtype``; everything else stays.
        dtype: a floating dtype.
    """
    name = str(dtype).removeprefix("torch.")
    given = {input_name: f"{input_name}.{name}" for input_name in program.inputs}
    cast_in = {old: new for old, new in given.items() if program.values[old].dtype == _FULL}

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return Ref(cast_in.get(leaf.name, leaf.name))
        return Dtype(name) if leaf == Dtype(_FULL) else leaf

    ops = [Op(_CAST, new, (Ref(old), Dtype(name))) for old, new in cast_in.items()]
    for op in program.ops:
        kwargs = {key: map_leaves(value, change) for key, value in op.kwargs.items()}
        changed = Op(op.kind, op.name, map_leaves(op.args, change), kwargs)
        if program.values[op.name].dtype == _FULL and not _follows_operands(op, program, weights):
            # arange without a dtype, a quotient of integers: float32 whatever the rest is.
            full = f"{op.name}.{_FULL}"
            ops.append(Op(op.kind, full, changed.args, kwargs))
            ops.append(Op(_CAST, op.name, (Ref(full), Dtype(name))))
        else:
            ops.append(changed)

    values = dict(program.values)
    for value, info in program.values.items():
        if value not in given and info.dtype == _FULL:
            values[value] = ValueInfo(info.shape, name)
    values.update((new, ValueInfo(values[old].shape, name)) for old, new in cast_in.items())

    cast_out: dict[str, str] = {}
    for value in program.output_names():
        if program.values[value].dtype == _FULL and value not in given:
            cast_out[value] = f"{value}.{_FULL}"
            ops.append(Op(_CAST, cast_out[value], (Ref(value), Dtype(_FULL))))
            values[cast_out[value]] = program.values[value]
    lowered = {
        key: weight.to(dtype) if weight.dtype == torch.float32 else weight
        for key, weight in weights.items()
    }
    returned = {leaf.name for leaf in leaves(program.outputs) if isinstance(leaf, WeightRef)}
    as_given = {key: f"{key}.{_FULL}" for key in returned if weights[key].dtype == torch.float32}
    lowered.update((new, weights[key]) for key, new in as_given.items())

    def change_output(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return Ref(cast_out.get(leaf.name, leaf.name))
        return (
            WeightRef(as_given.get(leaf.name, leaf.name)) if isinstance(leaf, WeightRef) else leaf
        )

    outputs = map_leaves(program.outputs, change_output)
    return replace(program, ops=tuple(ops), values=values, outputs=outputs), lowered


def _follows_operands(op: Op, program: Program, weights: Mapping[str, Tensor]) -> bool:
    """Whether the result is of another dtype once the operands, or a dtype that it names, are."""
    if any(leaf == Dtype(_FULL) for leaf in leaves((op.args, tuple(op.kwargs.values())))):
        return True
    reads = [program.values[value].dtype for value in op.refs()]
    if any(dtype in (_FULL, "tuple") for dtype in reads):
        return True
    return any(weights[key].dtype == torch.float32 for key in op.weight_refs())
