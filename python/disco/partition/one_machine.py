"""The plan's sparsity on one machine: a layer runs all its nodes' blocks, skipping zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from disco.partition.norms import merge_norms
from disco.partition.planner import Decisions
from disco.partition.read_groups import ChannelsRead, channels_read, in_whole_groups
from disco.partition.reductions import merge_reductions
from disco.partition.rules import Lowering
from disco.program import Arg, Op, Program
from disco_kernels.pattern import Ownership, Selected

_GATHERED = {"disco.conv2d": "disco.gather_conv2d", "disco.linear": "disco.gather_linear"}

# Splitting a layer into N blocks gives it N ragged last tiles, so it has to save something: a layer
# with a pattern at d = 0.2 saves 40% on two nodes, one with a few dead channels next to nothing.
_LEAST_SAVING = 0.1


class SkippingLayer(NamedTuple):
    """A layer that reads, on every node's behalf, only what it has weights for.

    Attributes:
        op: the dense one.
        outputs, inputs: who computes and owns them.
        selected: ``[receiver][sender]`` channels that have weights.
        read: those that are read: whole groups.
    """

    op: Op
    outputs: Ownership
    inputs: Ownership
    selected: Selected
    read: Selected


def skipping_layers(decisions: Decisions, group_size: int = 1) -> list[SkippingLayer]:
    """The convolutions and linears whose zeros make a pattern that is worth skipping."""
    pairs = zip(decisions.program.ops, decisions.lowerings, strict=True)
    found = (_skipping(op, lowering, group_size) for op, lowering in pairs)
    return [layer for layer in found if layer is not None]


def one_machine_program(
    decisions: Decisions, group_size: int = 1
) -> tuple[Program, dict[str, ChannelsRead]]:
    """The whole program with those layers gathered, and what they read, by the layer's value.

    Args:
        decisions: of a model and its pattern.
        group_size: channels are read in whole groups of so many neighbours.
    """
    layers = {layer.op.name: layer for layer in skipping_layers(decisions, group_size)}
    read: dict[str, ChannelsRead] = {}
    ops: list[Op] = []
    for op in decisions.program.ops:
        layer = layers.get(op.name)
        if layer is not None:
            read[op.name] = channels_read(layer.inputs, layer.selected, layer.read)
            op = _gathered(layer)
        ops.append(op)
    return merge_reductions(merge_norms(replace(decisions.program, ops=tuple(ops)))), read


def _skipping(op: Op, lowering: Lowering, group_size: int) -> SkippingLayer | None:
    out, inputs = lowering.out_ownership, lowering.in_ownership
    if op.kind not in _GATHERED or out is None or inputs is None or op.kwargs.get("groups", 1) != 1:
        return None
    read = in_whole_groups(inputs, lowering.selected, group_size)
    products = sum(
        len(out.channels[rank]) * (len(own) + sum(map(len, read[rank])))
        for rank, own in enumerate(inputs.channels)
    )
    if products > (1 - _LEAST_SAVING) * out.num_channels * inputs.num_channels:
        return None
    return SkippingLayer(op, out, inputs, lowering.selected, read)


def _gathered(layer: SkippingLayer) -> Op:
    op = layer.op
    attributes: dict[str, Arg] = {key: v for key, v in op.kwargs.items() if key != "groups"}
    attributes["out_ownership"] = _plain(layer.outputs.channels)
    attributes["in_ownership"] = _plain(layer.inputs.channels)
    attributes["selected"] = tuple(_plain(row) for row in layer.read)
    return Op(_GATHERED[op.kind], op.name, op.args, attributes)


def _plain(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)
