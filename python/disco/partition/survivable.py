"""A form of the model that answers over all its outputs whichever nodes are there.

The last layers before the outputs, its heads, are not split by outputs: each rank multiplies the
inputs that it owns, for all outputs, and all ranks add up the parts of all. A rank that is gone
then takes its channels with it, and no output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules import Lowering
from disco.partition.rules.parts import LAYER_OF_PARTS, PART_OF_LAYER
from disco.program import Op, Program, Ref, ValueInfo

_LAYERS = ("disco.conv2d", "disco.linear")


def split_heads(program: Program, world_size: int) -> Program:
    """With the last layers before every output in two ops: parts, and what they come to."""
    heads = _heads(program)
    ops: list[Op] = []
    values = dict(program.values)
    for op in program.ops:
        if op.name not in heads:
            ops.append(op)
            continue
        x, weight, bias, residual = op.args
        info = values[op.name]
        dim = 1 if op.kind == "disco.conv2d" else len(info.shape) - 1
        channels = info.shape[dim]
        assert isinstance(channels, int)
        parts = f"{op.name}.parts"
        shape = (*info.shape[:dim], channels * world_size, *info.shape[dim + 1 :])
        values[parts] = ValueInfo(shape, info.dtype)
        ops.append(Op(PART_OF_LAYER, parts, (x, weight), {**op.kwargs, "layer": op.kind}))
        attributes = {"dim": dim, "parts": world_size, "activation": op.kwargs["activation"]}
        ops.append(Op(LAYER_OF_PARTS, op.name, (Ref(parts), bias, residual), attributes))
    return replace(program, ops=tuple(ops), values=values)


def count_means(program: Program, lowerings: Sequence[Lowering]) -> list[Lowering]:
    """With the means over shared-out channels told how many of them each rank has."""
    made = {op.name: (op, low) for op, low in zip(program.ops, lowerings, strict=True)}
    counted = []
    for op, lowering in zip(program.ops, lowerings, strict=True):
        if op.kind == "disco.sum_of_parts" and op.kwargs["how"] == "mean" and lowering.whole:
            parts, _ = made[lowering.whole[0]]
            source = next(parts.refs())
            _, before = made[source]
            assert isinstance(before.placement, Sharded)
            counts = before.placement.ownership.counts
            lowering = replace(lowering, emit=_with_counts(lowering, counts))
        counted.append(lowering)
    return counted


def _with_counts(lowering: Lowering, counts: tuple[int, ...]) -> Callable[[Op, RankBuilder], None]:
    def emit(op: Op, rank: RankBuilder) -> None:
        lowering.emit(replace(op, kwargs={**op.kwargs, "counts": counts}), rank)

    return emit


def _heads(program: Program) -> set[str]:
    """The layers from which an output can be reached without passing another one."""
    made = {op.name: op for op in program.ops}
    found: set[str] = set()
    seen: set[str] = set()
    pending = list(program.output_names())
    while pending:
        op = made.get(pending.pop())
        if op is None or op.name in seen:
            continue
        seen.add(op.name)
        if op.kind in _LAYERS and op.kwargs.get("groups", 1) == 1:
            found.add(op.name)
        else:
            pending.extend(op.refs())
    return found
