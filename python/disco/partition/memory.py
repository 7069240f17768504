"""What a rank's program takes in memory, by the scan that the executor allocates by.

Three parts, for a request of one image:

- packed weights: a matrix's outputs are padded to whole vectors, everything else is as it is in the
  shard; by Winograd, which shards do not use, a matrix would take 16 or 36 words for 9;
- activations: the buffers that kernels write to, which stay, and the peak of what torch's own ops
  allocate besides, views not counted; the input;
- messages: every exchange has its own buffers, which stay.

Scratch memory inside a kernel is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from disco.partition.placement import Sharded
from disco.partition.prediction import NodeMemory
from disco.partition.rank_builder import Exchange, RankProgram
from disco.partition.rules import RuleContext
from disco.program import (
    Op,
    Program,
    Ref,
    WeightRef,
    leaves,
    overwritten_residual,
    plan_buffers,
)

_MATRIX_KINDS = frozenset(
    {"disco.conv2d", "disco.linear", "disco.partial_conv2d", "disco.partial_linear"}
)
# The kernels pad a matrix's outputs to panels of this many, AVX-512's narrowest; narrower vectors
# pad less.
PANEL = 16
_LINE_BYTES = 64
# Results that share memory with their first argument.
_VIEWS = frozenset(
    {
        "aten._unsafe_view.default",
        "aten.alias.default",
        "aten.expand.default",
        "aten.flatten.using_ints",
        "aten.permute.default",
        "aten.reshape.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split_with_sizes.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.transpose.int",
        "aten.unbind.int",
        "aten.unsqueeze.default",
        "aten.view.default",
        "operator.getitem",
    }
)


def predict_memory(
    part: RankProgram, rank: int, context: RuleContext, exchanges: Mapping[str, Exchange]
) -> NodeMemory:
    """Of one rank."""
    num_bytes = _value_bytes(part, rank, context, exchanges)
    program = part.program
    kept = {op.name: overwritten_residual(op) for op in program.ops if op.kind in _MATRIX_KINDS}
    buffers: dict[int, int] = {}
    numbers = plan_buffers(program, kept)
    for name, number in numbers.items():
        buffers[number] = max(buffers.get(number, 0), num_bytes[name])
    other = {
        op.name: num_bytes[op.name]
        for op in program.ops
        if op.name not in numbers and op.kind not in _VIEWS and op.kind != "disco.exchange"
    }
    inputs = sum(num_bytes[name] for name in program.inputs)
    return NodeMemory(
        weight_bytes=_packed_bytes(part),
        activation_bytes=inputs + sum(map(_lines, buffers.values())) + _peak(program, other),
        message_bytes=sum(_message_bytes(exchange, rank) for exchange in exchanges.values()),
    )


def _packed_bytes(part: RankProgram) -> int:
    matrices = {
        op.args[1].name
        for op in part.program.ops
        if op.kind in _MATRIX_KINDS and isinstance(op.args[1], WeightRef)
    }
    return sum(
        _padded(weight) if name in matrices else weight.nbytes
        for name, weight in part.weights.items()
    )


def _padded(weight: Tensor) -> int:
    outputs = weight.shape[0]
    return weight.nbytes // max(outputs, 1) * (-(-outputs // PANEL) * PANEL)


def _message_bytes(exchange: Exchange, rank: int) -> int:
    total = 0
    for part in exchange.parts:
        received = sum(len(channels) for channels in part.sent[rank])
        sent = sum(len(row[rank]) for row in part.sent)
        total += (sent + received) * part.elements_per_channel * _item_bytes(part.dtype)
    return total


def _value_bytes(
    part: RankProgram, rank: int, context: RuleContext, exchanges: Mapping[str, Exchange]
) -> dict[str, int]:
    """Bytes of every value of a rank's program: its own part of a sharded one."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    received: dict[str, list[tuple[int, ...]]] = {}
    for name in part.program.inputs:
        shapes[name], dtypes[name] = context.sizes(name), context.values[name].dtype
    for op in part.program.ops:
        read = [name for name in op.refs() if name in shapes]
        dtypes[op.name] = dtypes[read[0]] if read else "float32"
        if op.name in context.values:
            shapes[op.name] = _own_sizes(op.name, rank, context)
            dtypes[op.name] = context.values[op.name].dtype
        elif op.kind == "disco.exchange":
            received[op.name] = [
                _with(context.sizes(part.value), part.placement.dim, len(channels))
                for part in exchanges[read[0]].parts
                for channels in part.sent[rank]
                if channels
            ]
            shapes[op.name] = (0,)
        elif op.kind == "operator.getitem" and read and read[0] in received:
            position = op.args[1]
            assert isinstance(position, int)
            shapes[op.name] = received[read[0]][position]
        else:
            shapes[op.name] = _added_sizes(op, shapes, part.weights)
    return {name: prod(sizes) * _item_bytes(dtypes[name]) for name, sizes in shapes.items()}


def _own_sizes(name: str, rank: int, context: RuleContext) -> tuple[int, ...]:
    placed, sizes = context.placements[name], context.sizes(name)
    if not isinstance(placed, Sharded):
        return sizes
    return _with(sizes, placed.dim, placed.ownership.counts[rank])


def _added_sizes(
    op: Op, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]
) -> tuple[int, ...]:
    """Of a value that only rank programs have; of an unknown kind, as its largest argument."""
    read = [shapes[leaf.name] for leaf in leaves(op.args) if isinstance(leaf, Ref)]
    dim = op.kwargs.get("dim")
    if op.kind == "disco.assemble" and isinstance(dim, int):
        return _with(read[0], dim, sum(sizes[dim] for sizes in read))
    if op.kind == "disco.take" and isinstance(dim, int):
        return _with(read[0], dim, weights[next(op.weight_refs())].numel())
    return max(read, key=prod, default=())


def _peak(program: Program, own_bytes: Mapping[str, int]) -> int:
    """Most bytes of these values that are alive at once; a view keeps alive what it looks at."""
    behind: dict[str, frozenset[str]] = {}
    last_read: dict[str, int] = {}
    for position, op in enumerate(program.ops):
        seen = frozenset().union(*(behind.get(name, frozenset()) for name in op.refs()))
        for name in seen:
            last_read[name] = position
        if op.name in own_bytes:
            behind[op.name] = frozenset({op.name})
            last_read[op.name] = position
        elif op.kind in _VIEWS:
            behind[op.name] = seen
    for name in program.output_names():
        for seen_name in behind.get(name, ()):
            last_read[seen_name] = len(program.ops)
    return _most_alive(program.ops, own_bytes, last_read)


def _most_alive(
    ops: Iterable[Op], own_bytes: Mapping[str, int], last_read: Mapping[str, int]
) -> int:
    dying: dict[int, int] = {}
    for name, position in last_read.items():
        dying[position] = dying.get(position, 0) + own_bytes[name]
    alive = peak = 0
    for position, op in enumerate(ops):
        alive += own_bytes.get(op.name, 0)
        peak = max(peak, alive)
        alive -= dying.get(position, 0)
    return peak


def _with(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES


def _item_bytes(dtype: str) -> int:
    """Numbers and tuples of values take none."""
    found = getattr(torch, dtype, None)
    return found.itemsize if isinstance(found, torch.dtype) else 0
