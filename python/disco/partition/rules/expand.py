"""Repeating entries of a dimension of size 1 without copying them."""

from __future__ import annotations

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule
from disco.program import Op


@rule("aten.expand.default")
def expand(op: Op, context: RuleContext) -> Lowering | None:
    """Local unless the channels themselves are repeated; -1 keeps each rank's own number."""
    placed, sizes = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(sizes, tuple):
        return None
    dim = placed.dim + len(sizes) - len(context.shape(op.args[0]))
    if sizes[dim] not in (-1, placed.ownership.num_channels):
        return None
    kept = (*sizes[:dim], -1, *sizes[dim + 1 :])

    def emit(op: Op, rank: RankBuilder) -> None:
        local = Op(op.kind, op.name, (op.args[0], kept, *op.args[2:]), op.kwargs)
        rank.add(local.replace_leaves(rank.localise))

    return Lowering(Sharded(placed.ownership, dim), emit)
