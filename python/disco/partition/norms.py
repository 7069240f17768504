"""Layer norms over channels that are shared out: statistics travel, not the channels.

``layer_norm(x)`` becomes ``moments(x)``, two numbers a token, and ``normalize(x, moments)``. Each
rank takes the moments of its own channels, all ranks get all of them, and each normalises its own
channels by what they come to together (Chan, Golub, LeVeque: Updating formulae and a pairwise
algorithm for computing sample variances, 1979; no cancellation).
"""

from __future__ import annotations

from dataclasses import replace

from disco.program import Arg, Op, Program, Ref, ValueInfo

_NORM = "aten.layer_norm.default"
_DEFAULTS: tuple[Arg, ...] = (None, None, 1e-5)


def split_norms(program: Program) -> Program:
    """With the layer norms of one dimension in two ops."""
    ops: list[Op] = []
    values = dict(program.values)
    for op in program.ops:
        channels = _normalised(op)
        if channels is None:
            ops.append(op)
            continue
        x = op.args[0]
        assert isinstance(x, Ref)
        weight, bias, eps = (*op.args[2:5], *_DEFAULTS[len(op.args) - 2 :])
        moments = f"{op.name}.moments"
        info = program.values[op.name]
        values[moments] = ValueInfo((*info.shape[:-1], 2), info.dtype)
        ops.append(Op("disco.moments", moments, (x,)))
        attributes: dict[str, Arg] = {"counts": (channels,), "eps": eps}
        ops.append(Op("disco.normalize", op.name, (x, Ref(moments), weight, bias), attributes))
    return replace(program, ops=tuple(ops), values=values)


def merge_norms(program: Program) -> Program:
    """The inverse: one op again, for one machine."""
    ops: list[Op] = []
    for op in program.ops:
        if op.kind == "disco.moments":
            continue
        if op.kind == "disco.normalize":
            x, _, weight, bias = op.args
            args = (x, op.kwargs["counts"], weight, bias, op.kwargs["eps"])
            ops.append(Op(_NORM, op.name, args))
        else:
            ops.append(op)
    values = {name: info for name, info in program.values.items() if not name.endswith(".moments")}
    return replace(program, ops=tuple(ops), values=values)


def _normalised(op: Op) -> int | None:
    """The size of the one dimension that an op normalises."""
    if op.kind != _NORM or op.kwargs or not isinstance(op.args[0], Ref) or len(op.args) > 6:
        return None
    sizes = op.args[1]
    if not isinstance(sizes, tuple) or len(sizes) != 1 or not isinstance(sizes[0], int):
        return None
    return sizes[0]
