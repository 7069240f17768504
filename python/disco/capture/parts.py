"""Ops that return several values, and chains of views, spelt out as what each does to one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disco.program import Arg, Op, Program, Ref, ValueInfo, WeightRef


def spell_out_parts(program: Program) -> Program:
    """``getitem(split(x), i)`` as a slice of ``x``, ``getitem(unbind(x), i)`` as a selection, and
    ``slice_scatter(x, y)`` as ``y`` between what is left of ``x``.

    Pieces of sizes that are not fixed stay as they are.
    """
    made = {op.name: op for op in program.ops}
    values = dict(program.values)
    ops: list[Op] = []
    for op in program.ops:
        ops += _written_over(op, values) or [_part(op, made, program) or op]
    return replace(program, ops=tuple(ops), values=values)


def _written_over(op: Op, values: dict[str, ValueInfo]) -> list[Op]:
    """What ``x[:, :n] = y`` becomes, as slices of ``x`` and their joining with ``y``; the slices
    are added to ``values``. Nothing for other ops and open sizes."""
    if op.kind != "aten.slice_scatter.default" or op.kwargs:
        return []
    x, y, *rest = op.args
    defaults: tuple[Arg, ...] = (0, None, None, 1)
    dim, start, end, step = (*rest, *defaults[len(rest) :])
    info, written = values[op.name], values[y.name] if isinstance(y, Ref) else None
    if not isinstance(dim, int) or step != 1 or written is None or written.dtype != info.dtype:
        return []
    dim %= len(info.shape)
    size, length = info.shape[dim], written.shape[dim]
    if not isinstance(size, int) or not isinstance(length, int) or not length:
        return []
    if not isinstance(start, int | None) or not isinstance(end, int | None):
        return []
    first = slice(start, end).indices(size)[0]  # a negative one counts from the end
    slices: list[Op] = []

    def left(part: str, low: int, high: int) -> list[Arg]:
        if low >= high:
            return []
        name, shape = f"{op.name}.{part}", (*info.shape[:dim], high - low, *info.shape[dim + 1 :])
        slices.append(Op("aten.slice.Tensor", name, (x, dim, low, high, 1)))
        values[name] = replace(info, shape=shape)
        return [Ref(name)]

    joined = (*left("before", 0, first), y, *left("after", first + length, size))
    return [*slices, Op("aten.cat.default", op.name, (joined, dim))]


def _part(op: Op, made: dict[str, Op], program: Program) -> Op | None:
    if op.kind != "operator.getitem" or not isinstance(op.args[0], Ref):
        return None
    source, number = made.get(op.args[0].name), op.args[1]
    if source is None or source.kwargs or not isinstance(number, int) or number < 0:
        return None
    x, *rest = source.args
    if not isinstance(x, Ref):
        return None
    if source.kind == "aten.unbind.int":
        return Op("aten.select.int", op.name, (x, rest[0] if rest else 0, number))
    if source.kind not in _SPLITS or not rest:
        return None
    dim = rest[1] if len(rest) > 1 else 0
    shape = program.values[x.name].shape
    if not isinstance(dim, int):
        return None
    size = shape[dim % len(shape)]
    bounds = _SPLITS[source.kind](rest[0], size) if isinstance(size, int) else None
    if bounds is None or number + 1 >= len(bounds):
        return None
    return Op("aten.slice.Tensor", op.name, (x, dim, bounds[number], bounds[number + 1], 1))


def _equal_pieces(length: object, size: int) -> list[int] | None:
    if not isinstance(length, int) or length < 1:
        return None
    return [*range(0, size, length), size]


def _listed_pieces(lengths: object, size: int) -> list[int] | None:
    if not isinstance(lengths, tuple):
        return None
    bounds = [0]
    for length in lengths:
        if not isinstance(length, int):
            return None
        bounds.append(bounds[-1] + length)
    return bounds if bounds[-1] == size else None


def _chunks(count: object, size: int) -> list[int] | None:
    return _equal_pieces(-(-size // count), size) if isinstance(count, int) and count > 0 else None


_SPLITS = {
    "aten.split.Tensor": _equal_pieces,
    "aten.split_with_sizes.default": _listed_pieces,
    "aten.chunk.default": _chunks,
}


def spell_out_shuffles(program: Program, weights: dict[str, Tensor]) -> Program:
    """A channel shuffle (ShuffleNet, arXiv 1707.01083: torch's own, or view, transpose, view) as
    the list of channels that it takes. The lists are added to ``weights``."""
    made = {op.name: op for op in program.ops}
    ops = []
    for op in program.ops:
        order = _shuffle(op, made, program)
        if order is None:
            ops.append(op)
            continue
        x, channels = order
        name = f"{op.name}.order"
        weights[name] = torch.tensor(channels, dtype=torch.int32)
        ops.append(Op("disco.take", op.name, (x, WeightRef(name)), {"dim": 1}))
    return replace(program, ops=tuple(ops))


def _shuffle(op: Op, made: dict[str, Op], program: Program) -> tuple[Ref, list[int]] | None:
    """The value whose channels ``op`` shuffles, and which of them comes first, second, ..."""
    if op.kind == "aten.channel_shuffle.default":
        x, groups = op.args
        channels = program.values[op.name].shape[1]
        if not (isinstance(x, Ref) and isinstance(groups, int) and isinstance(channels, int)):
            return None
        return x, _shuffled(groups, channels // groups)
    chain = [op]
    for kinds in (("aten.transpose.int",), _VIEWS):
        source = chain[-1].args[0]
        before = made.get(source.name) if isinstance(source, Ref) else None
        if before is None or before.kind not in kinds:
            return None
        chain.append(before)
    last, transpose, first = chain
    x = first.args[0]
    if last.kind not in _VIEWS or transpose.args[1:3] != (1, 2) or not isinstance(x, Ref):
        return None
    shape, split = (program.values[name].shape for name in (x.name, first.name))
    if program.values[last.name].shape != shape or len(split) != len(shape) + 1 or len(shape) < 2:
        return None
    if [split[0], *split[3:]] != [shape[0], *shape[2:]]:
        return None
    groups, size = split[1:3]
    if not isinstance(groups, int) or not isinstance(size, int) or groups * size != shape[1]:
        return None
    return x, _shuffled(groups, size)


def _shuffled(groups: int, size: int) -> list[int]:
    return [g * size + c for c in range(size) for g in range(groups)]


_VIEWS: Sequence[str] = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
