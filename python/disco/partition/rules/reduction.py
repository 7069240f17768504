"""Reductions over channels in two ops (`disco.partition.reductions`)."""

from __future__ import annotations

from disco.partition.placement import Replicated, Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Op, Ref
from disco_kernels.pattern import Ownership


@rule("disco.part_of_sum")
def part_of_sum(op: Op, context: RuleContext) -> Lowering | None:
    """Over each rank's own channels: one number of every rank, side by side."""
    placed, dim = context.sharded(op.args[0]), op.kwargs["dim"]
    if placed is None or not isinstance(dim, int):
        return None
    if placed.dim != dim:
        return same_op(placed)
    one_each = Ownership(tuple((rank,) for rank in range(context.world_size)))
    return same_op(Sharded(one_each, dim))


@rule("disco.sum_of_parts")
def sum_of_parts(op: Op, context: RuleContext) -> Lowering | None:
    """Every rank the same, of the parts of all."""
    parts, dim = op.args[0], op.kwargs["dim"]
    placed = context.sharded(parts)
    if placed is None or not isinstance(parts, Ref) or not isinstance(dim, int):
        return None
    if placed.dim != dim:
        gone = 0 if op.kwargs["keepdim"] or placed.dim < dim else 1
        return same_op(Sharded(placed.ownership, placed.dim - gone))

    def emit(op: Op, rank: RankBuilder) -> None:
        rank.add(Op(op.kind, op.name, (rank.whole(parts),), op.kwargs))

    return Lowering(Replicated(), emit, whole=(parts.name,))
