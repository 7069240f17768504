"""Sums, means and norms over channels that are shared out: one number a rank travels, not channels.

``sum(x, dim)`` becomes ``part_of_sum(x)``, each rank's sum over its own channels, and
``sum_of_parts``, which every rank makes of all of them. Where the dimension turns out not to be
shared out, the two do what the one did.
"""

from __future__ import annotations

from dataclasses import replace

from disco.program import Arg, Op, Program, Ref, ValueInfo

_PARTS = "disco.part_of_sum"
_WHOLE = "disco.sum_of_parts"
_REDUCTIONS = {
    "aten.sum.dim_IntList": "sum",
    "aten.mean.dim": "mean",
    "aten.linalg_vector_norm.default": "norm",
}
_KINDS = {name: kind for kind, name in _REDUCTIONS.items()}


def split_reductions(program: Program) -> Program:
    """With the reductions of one dimension that may hold channels in two ops."""
    ops: list[Op] = []
    values = dict(program.values)
    for op in program.ops:
        found = _reduced(op, program)
        if found is None:
            ops.append(op)
            continue
        x, dim, keepdim, size = found
        how = _REDUCTIONS[op.kind]
        parts = f"{op.name}.parts"
        shape = program.values[x.name].shape
        values[parts] = ValueInfo(
            (*shape[:dim], 1, *shape[dim + 1 :]), program.values[x.name].dtype
        )
        ops.append(Op(_PARTS, parts, (x,), {"dim": dim, "square": how == "norm"}))
        attributes: dict[str, Arg] = {"dim": dim, "keepdim": keepdim, "size": size, "how": how}
        ops.append(Op(_WHOLE, op.name, (Ref(parts),), attributes))
    return replace(program, ops=tuple(ops), values=values)


def merge_reductions(program: Program) -> Program:
    """The inverse: one op again, for one machine."""
    sources = {op.name: op.args[0] for op in program.ops if op.kind == _PARTS}
    ops: list[Op] = []
    for op in program.ops:
        if op.kind == _WHOLE and isinstance(op.args[0], Ref):
            how = str(op.kwargs["how"])
            dims, keepdim = (op.kwargs["dim"],), op.kwargs["keepdim"]
            power: tuple[Arg, ...] = (2.0,) if how == "norm" else ()
            args = (sources[op.args[0].name], *power, dims, keepdim)
            ops.append(Op(_KINDS[how], op.name, args))
        elif op.kind != _PARTS:
            ops.append(op)
    values = {name: info for name, info in program.values.items() if name not in sources}
    return replace(program, ops=tuple(ops), values=values)


def _reduced(op: Op, program: Program) -> tuple[Ref, int, bool, int] | None:
    """What an op reduces, over which dimension, whether it keeps that, and its size."""
    if op.kind not in _REDUCTIONS or op.kwargs or not isinstance(op.args[0], Ref):
        return None
    x, *rest = op.args
    if op.kind == "aten.linalg_vector_norm.default":
        power, *rest = rest or [2]
        if power != 2:
            return None
    dims, keepdim = rest[0] if rest else None, rest[1] if len(rest) > 1 else False
    if not isinstance(dims, tuple) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    assert isinstance(x, Ref)
    info = program.values[x.name]
    dim = dims[0] % len(info.shape)
    size = info.shape[dim]
    # Channels are second in maps and last in tokens. Integers would be summed up in another dtype.
    if dim not in (1, len(info.shape) - 1) or not isinstance(size, int) or dim == 0:
        return None
    if (
        not info.dtype.startswith(("float", "bfloat"))
        or info.dtype != program.values[op.name].dtype
    ):
        return None
    return x, dim, bool(keepdim), size
