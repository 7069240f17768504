"""Layer norms in two ops (`disco.partition.norms`)."""

from __future__ import annotations

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Op, Ref, WeightRef
from disco_kernels.pattern import Ownership


@rule("disco.moments")
def moments(op: Op, context: RuleContext) -> Lowering | None:
    """Of each rank's own channels: two numbers of every rank's, side by side."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    last = len(context.shape(op.args[0])) - 1
    if placed.dim != last:
        return same_op(placed)
    pairs = Ownership(tuple((2 * rank, 2 * rank + 1) for rank in range(context.world_size)))
    return same_op(Sharded(pairs, last))


@rule("disco.normalize")
def normalize(op: Op, context: RuleContext) -> Lowering | None:
    """Each rank its own channels, by the moments of all."""
    x, given, weight, bias = op.args
    placed = context.sharded(x)
    if placed is None or not isinstance(given, Ref):
        return None
    if placed.dim != len(context.shape(x)) - 1:
        return same_op(placed)

    def emit(op: Op, rank: RankBuilder) -> None:
        owned = placed.ownership
        scale, shift = (None if w is None else rank.part(w, owned, 0) for w in (weight, bias))
        args = (x, rank.whole(given), scale, shift)
        rank.add(Op(op.kind, op.name, args, {**op.kwargs, "counts": owned.counts}))

    constant = not any(isinstance(w, Ref) for w in (weight, bias))

    def replay(op: Op, rank: RankBuilder, piece: Ref, channels: tuple[int, ...], name: str) -> None:
        scale, shift = (
            rank.taken(w, channels) if isinstance(w, WeightRef) else None for w in (weight, bias)
        )
        args = (piece, rank.whole(given), scale, shift)
        counts = placed.ownership.counts
        rank.add(Op(op.kind, name, args, {**op.kwargs, "counts": counts}))

    return Lowering(placed, emit, whole=(given.name,), replay=replay if constant else None)
