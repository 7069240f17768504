"""Layers of which each rank has a part of the sum (`disco.partition.survivable`).

    y = act( sum over j of W[:, O_j] * x_j + bias + residual )

Rank j multiplies the inputs O_j that it owns, for all outputs, and every rank adds up the parts of
all, in the order of the ranks.
"""

from __future__ import annotations

from disco.partition.placement import Replicated, Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.matrix import matrix_flops
from disco.partition.rules.registry import Lowering, RuleContext, missing, rule
from disco.program import Op, Ref, WeightRef
from disco_kernels.pattern import Ownership

PART_OF_LAYER = "disco.part_of_layer"
LAYER_OF_PARTS = "disco.layer_of_parts"
_RANK_KINDS = {"disco.conv2d": "disco.partial_conv2d", "disco.linear": "disco.partial_linear"}


@rule(PART_OF_LAYER)
def part_of_layer(op: Op, context: RuleContext) -> Lowering:
    """Of each rank's own inputs, or of its share of those that all have: as many outputs as the
    layer has, of every rank, side by side."""
    x, weight = op.args
    assert isinstance(x, Ref) and isinstance(weight, WeightRef)
    kind = str(op.kwargs["layer"])
    dim = 1 if kind == "disco.conv2d" else len(context.shape(x)) - 1
    outputs, inputs = (int(size) for size in context.shape(weight)[:2])
    placed = context.sharded(x)
    held = (
        placed.ownership
        if placed is not None and placed.dim == dim
        else context.share_out(op.name, inputs)
    )
    reshare, whole = missing([(x, Sharded(held, dim))], context)

    def emit(op: Op, rank: RankBuilder) -> None:
        own = list(held.channels[rank.rank])
        kernel = rank.store(f"{context.layer_of(op)}.weight", rank.source(weight)[:, own])
        attributes = {k: v for k, v in op.kwargs.items() if k not in ("groups", "layer")}
        attributes |= {"activation": "none", "channels": (len(own),), "index": (None,)}
        part = rank.part(x, held, dim)
        rank.add(Op(_RANK_KINDS[kind], op.name, ((part,), kernel, None, None), attributes))

    side_by_side = Ownership(
        tuple(tuple(range(outputs * r, outputs * (r + 1))) for r in range(context.world_size))
    )
    # The value has the outputs of all ranks, of which a rank computes one world_size-th.
    flops = tuple(
        matrix_flops(op, context, outputs, count) // context.world_size for count in held.counts
    )
    return Lowering(
        Sharded(side_by_side, dim),
        emit,
        reshare=reshare,
        whole=whole,
        flops=flops,
        in_ownership=held if placed is not None and not whole else None,
    )


@rule(LAYER_OF_PARTS)
def layer_of_parts(op: Op, context: RuleContext) -> Lowering | None:
    """Every rank the same, of the parts of all."""
    parts, _, residual = op.args
    assert isinstance(parts, Ref)
    _, whole = missing([(parts, None), (residual, None)], context)

    def emit(op: Op, rank: RankBuilder) -> None:
        rank.add(op.replace_leaves(rank.globalise))

    return Lowering(Replicated(), emit, whole=whole)
