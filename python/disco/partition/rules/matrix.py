"""Linears, and what they share with convolutions: outputs are split, inputs selected.

    y_i = act( W_ii * x_i + sum over j != i of W_ij[:, S_ij] * x_j[S_ij] + bias_i + residual_i )

(DISCO, arXiv 2302.11180, section 3.) The rank's weight is W[O_i] with its columns in the order in
which its segments deliver them: its own channels, then each sender's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from disco.errors import InputError
from disco.partition.placement import Sharded, all_selected
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, missing, rule, same_op
from disco.program import Arg, Op, Ref, WeightRef
from disco_kernels.pattern import Ownership, Selected


@rule("disco.linear")
def linear(op: Op, context: RuleContext) -> Lowering | None:
    """``[..., C]``, channels in the last dimension; local where another one is shared out."""
    last = len(context.shape(op.args[0])) - 1
    placed, residual = context.sharded(op.args[0]), op.args[3]
    alike = residual is None or context.sharded(residual) == placed
    if placed is not None and placed.dim != last and alike:
        return _along_others(op, context, placed)
    return split_outputs(op, context, "disco.partial_linear", in_dim=last, out_dim=last)


def choose_ownership(
    op: Op, context: RuleContext, num_channels: int, residual: Arg, dim: int
) -> Ownership:
    """Who computes which outputs: as the planner has chosen, as fixed by the user, else as the
    residual, else in the ranks' shares."""
    chosen = context.chosen.get(op.name)
    if chosen is not None:
        return chosen
    layer = context.layer_of(op)
    fixed = context.out_ownership.get(layer)
    if fixed is not None:
        if (fixed.num_channels, fixed.world_size) != (num_channels, context.world_size):
            raise InputError(
                f"the ownership given for layer {layer!r} covers {fixed.num_channels} channels on "
                f"{fixed.world_size} nodes; the layer has {num_channels} outputs and the plan "
                f"{context.world_size} nodes"
            )
        return fixed
    tied = context.sharded(residual)
    if tied is not None and tied.dim == dim:
        return tied.ownership
    return context.share_out(op.name, num_channels)


def matrix_flops(op: Op, context: RuleContext, num_outputs: int, num_inputs: int) -> int:
    """2 x multiply-accumulates of one image, for so many outputs and inputs (inputs per group)."""
    channels, _, *kernel = (int(size) for size in context.shape(op.args[1]))
    positions = prod(context.sizes(op.name)) // channels if channels else 0
    return 2 * positions * num_outputs * num_inputs * prod(kernel)


def split_outputs(
    op: Op, context: RuleContext, rank_kind: str, in_dim: int, out_dim: int
) -> Lowering:
    """The lowering of a matrix op: `rank_kind` over segments, its outputs split by ownership."""
    x, weight, _, residual = op.args
    assert isinstance(x, Ref) and isinstance(weight, WeightRef)
    num_outputs, num_inputs = (int(size) for size in context.shape(weight)[:2])
    out = choose_ownership(op, context, num_outputs, residual, out_dim)
    placed = context.sharded(x)
    whole = []
    inputs: Ownership | None = None
    selected: Selected = ()
    if placed is not None and placed.dim == in_dim:
        inputs = placed.ownership
        selected = all_selected(inputs)
        if not context.dense_exchange:
            selected = context.selected(weight, out, inputs)
        columns = [
            [*inputs.channels[r], *(c for row in selected[r] for c in row)]
            for r in range(context.world_size)
        ]
    else:
        if placed is not None:
            whole.append(x.name)
        columns = [_used_columns(context, weight, owned) for owned in out.channels]
    reshare, whole_residual = missing([(residual, Sharded(out, out_dim))], context)

    def emit(op: Op, rank: RankBuilder) -> None:
        segments = _Segments(rank, x, inputs, selected, columns[rank.rank], num_inputs)
        layer = context.layer_of(op)
        kernel = rank.source(weight)[list(out.channels[rank.rank])][:, columns[rank.rank]]
        bias = op.args[2]
        if isinstance(bias, WeightRef):
            owned = list(out.channels[rank.rank])
            bias = rank.store(f"{layer}.bias", rank.source(bias)[owned])
        part = rank.part(residual, out, out_dim) if isinstance(residual, Ref) else None
        index = tuple(
            None if positions is None else rank.store(f"{layer}.index.{i}", positions)
            for i, positions in enumerate(segments.index)
        )
        args = (tuple(segments.values), rank.store(f"{layer}.weight", kernel), bias, part)
        attributes = {key: value for key, value in op.kwargs.items() if key != "groups"}
        rank.add(
            Op(
                rank_kind,
                op.name,
                args,
                {**attributes, "channels": tuple(segments.held), "index": index},
            )
        )

    return Lowering(
        placement=Sharded(out, out_dim),
        emit=emit,
        select={} if inputs is None else {x.name: selected},
        reshare=reshare,
        whole=(*whole, *whole_residual),
        flops=tuple(
            matrix_flops(op, context, len(out.channels[r]), len(columns[r]))
            for r in range(context.world_size)
        ),
        out_ownership=out,
        in_ownership=inputs,
        selected=selected,
    )


def _along_others(op: Op, context: RuleContext, placed: Sharded) -> Lowering:
    """The whole matrix on every rank, each for its own rows: MLP-Mixer's mixing of tokens."""
    outputs, inputs = (int(size) for size in context.shape(op.args[1])[:2])
    flops = matrix_flops(op, context, outputs, inputs)
    whole = max(placed.ownership.num_channels, 1)
    local = same_op(placed)
    return replace(local, flops=tuple(flops * count // whole for count in placed.ownership.counts))


class _Segments:
    """The values that hold a rank's inputs, how many channels each, and which of them are read."""

    def __init__(
        self,
        rank: RankBuilder,
        x: Ref,
        inputs: Ownership | None,
        selected: Selected,
        columns: Sequence[int],
        num_inputs: int,
    ) -> None:
        self.values: list[Ref] = []
        self.held: list[int] = []
        self.index: list[Tensor | None] = []
        if inputs is None:
            self._add(rank.whole(x), columns, range(num_inputs))
            return
        owned = inputs.channels[rank.rank]
        # A rank without channels of its own reads an empty segment if there is nothing else: it
        # carries the batch and image size.
        if owned or not any(selected[rank.rank]):
            self._add(x, owned, owned)
        for peer, wanted in enumerate(selected[rank.rank]):
            if wanted:
                self._add(rank.payload(x, peer), wanted, rank.received(x, peer))

    def _add(self, value: Ref, wanted: Sequence[int], held: Sequence[int]) -> None:
        """Read the channels `wanted` of a value that holds `held`."""
        place = {channel: i for i, channel in enumerate(held)}
        positions = [place[channel] for channel in wanted]
        everything = positions == list(range(len(held)))
        self.values.append(value)
        self.held.append(len(held))
        self.index.append(None if everything else torch.tensor(positions, dtype=torch.int32))


def _used_columns(context: RuleContext, weight: WeightRef, outputs: Sequence[int]) -> list[int]:
    """Columns of W[outputs] that are not all zero: of a replicated input only those are read."""
    num_inputs = int(context.shape(weight)[1])
    if context.dense_exchange or not outputs:
        return list(range(num_inputs))
    used = context.used_columns(weight)[list(outputs)]
    return [column for column, needed in enumerate(used.any(dim=0).tolist()) if needed]
