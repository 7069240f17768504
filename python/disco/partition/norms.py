"""Norms over channels that are shared out: statistics travel, and the channels that are read.

``layer_norm(x)`` becomes ``moments(x)``, two numbers a token, and ``normalize(x, moments)``;
``group_norm(x)`` the same with two numbers a group. Each rank takes the moments of its own
channels, all ranks get all of them, and each normalises what it has by what they come to together.
"""

from __future__ import annotations

from dataclasses import replace

from disco.program import Arg, Op, Program, Ref, ValueInfo

_LAYER_NORM, _GROUP_NORM = "aten.layer_norm.default", "aten.group_norm.default"
_DEFAULTS: tuple[Arg, ...] = (None, None, 1e-5)


def split_norms(program: Program) -> Program:
    """With the layer norms of one dimension, and the group norms, in two ops."""
    ops: list[Op] = []
    values = dict(program.values)
    for op in program.ops:
        split = _split(op, values)
        if split is None:
            ops.append(op)
            continue
        shape, *both = split
        values[both[0].name] = ValueInfo(shape, values[op.name].dtype)
        ops += both
    return replace(program, ops=tuple(ops), values=values)


def merge_norms(program: Program) -> Program:
    """The inverse: one op again, for one machine."""
    ops: list[Op] = []
    for op in program.ops:
        if op.kind in ("disco.moments", "disco.group_moments"):
            continue
        if op.kind == "disco.normalize":
            x, _, weight, bias = op.args
            args = (x, op.kwargs["counts"], weight, bias, op.kwargs["eps"])
            ops.append(Op(_LAYER_NORM, op.name, args))
        elif op.kind == "disco.group_normalize":
            x, _, weight, bias = op.args
            counts = op.kwargs["counts"]
            assert isinstance(counts, tuple) and isinstance(counts[0], tuple)
            args = (x, len(counts[0]), weight, bias, op.kwargs["eps"])
            ops.append(Op(_GROUP_NORM, op.name, args))
        else:
            ops.append(op)
    values = {name: info for name, info in program.values.items() if not name.endswith(".moments")}
    return replace(program, ops=tuple(ops), values=values)


def _split(op: Op, values: dict[str, ValueInfo]) -> tuple[tuple[int | str, ...], Op, Op] | None:
    """The shape of the moments, and the two ops; None for any other op."""
    if op.kind not in (_LAYER_NORM, _GROUP_NORM) or op.kwargs or not 2 <= len(op.args) <= 6:
        return None
    x, sizes = op.args[:2]
    if not isinstance(x, Ref):
        return None
    weight, bias, eps = (*op.args[2:5], *_DEFAULTS[len(op.args[:5]) - 2 :])
    shape = values[x.name].shape
    moments = f"{op.name}.moments"
    args = (x, Ref(moments), weight, bias)
    if op.kind == _LAYER_NORM:
        if not isinstance(sizes, tuple) or len(sizes) != 1 or not isinstance(sizes[0], int):
            return None
        attributes: dict[str, Arg] = {"counts": (sizes[0],), "eps": eps}
        both = Op("disco.moments", moments, (x,)), Op("disco.normalize", op.name, args, attributes)
        return ((*shape[:-1], 2), *both)
    channels = shape[1]
    if not isinstance(sizes, int) or not isinstance(channels, int):
        return None
    groups = tuple(channel // (channels // sizes) for channel in range(channels))
    counts = ((channels // sizes,) * sizes,)
    listed: dict[str, Arg] = {"groups": groups, "num_groups": sizes}
    attributes = {"groups": groups, "counts": counts, "eps": eps}
    both = (
        Op("disco.group_moments", moments, (x,), listed),
        Op("disco.group_normalize", op.name, args, attributes),
    )
    return ((shape[0], 2 * sizes), *both)
