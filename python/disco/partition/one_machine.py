"""The plan's sparsity on one machine: a layer runs all its nodes' blocks, skipping zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disco.partition.norms import merge_norms
from disco.partition.planner import Decisions
from disco.partition.reductions import merge_reductions
from disco.partition.rules import Lowering
from disco.program import Arg, Op, Program

_GATHERED = {"disco.conv2d": "disco.gather_conv2d", "disco.linear": "disco.gather_linear"}
GATHERED_KINDS = frozenset(_GATHERED.values())

# Splitting a layer into N blocks gives it N ragged last tiles, so it has to save something: a layer
# with a pattern at d = 0.2 saves 40% on two nodes, one with a few dead channels next to nothing.
_LEAST_SAVING = 0.1


def one_machine_program(decisions: Decisions) -> Program:
    """The whole program with those convolutions and linears gathered whose zeros make a pattern."""
    pairs = zip(decisions.program.ops, decisions.lowerings, strict=True)
    ops = tuple(_gathered(op, lowering) for op, lowering in pairs)
    return merge_reductions(merge_norms(replace(decisions.program, ops=ops)))


def _gathered(op: Op, lowering: Lowering) -> Op:
    out, inputs = lowering.out_ownership, lowering.in_ownership
    if op.kind not in _GATHERED or out is None or inputs is None or op.kwargs.get("groups", 1) != 1:
        return op
    read = sum(
        len(out.channels[rank]) * (len(own) + sum(map(len, lowering.selected[rank])))
        for rank, own in enumerate(inputs.channels)
    )
    if read > (1 - _LEAST_SAVING) * out.num_channels * inputs.num_channels:
        return op
    attributes: dict[str, Arg] = {key: v for key, v in op.kwargs.items() if key != "groups"}
    attributes["out_ownership"] = _plain(out.channels)
    attributes["in_ownership"] = _plain(inputs.channels)
    attributes["selected"] = tuple(_plain(row) for row in lowering.selected)
    return Op(_GATHERED[op.kind], op.name, op.args, attributes)


def _plain(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)
