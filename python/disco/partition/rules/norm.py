"""Norms in two ops (`disco.partition.norms`): statistics of each rank's own channels, then those of
all ranks applied to any channels that a rank has, its own or received ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Arg, Op, Ref, WeightRef
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
    return same_op(Sharded(_side_by_side(2, context.world_size), last))


@rule("disco.normalize")
def normalize(op: Op, context: RuleContext) -> Lowering | None:
    """Each rank its own channels, by the moments of all."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    if placed.dim != len(context.shape(op.args[0])) - 1:
        return same_op(placed)
    counts = placed.ownership.counts
    return _applied(op, placed, lambda _: {**op.kwargs, "counts": counts}, everywhere=True)


@rule("disco.group_moments")
def group_moments(op: Op, context: RuleContext) -> Lowering | None:
    """Of each rank's own channels of every group."""
    placed, groups = context.sharded(op.args[0]), op.kwargs["groups"]
    num_groups = op.kwargs["num_groups"]
    if placed is None or placed.dim != 1:
        return None
    assert isinstance(groups, tuple) and isinstance(num_groups, int)

    def emit(op: Op, rank: RankBuilder) -> None:
        own = tuple(groups[channel] for channel in placed.ownership.channels[rank.rank])
        rank.add(Op(op.kind, op.name, op.args, {**op.kwargs, "groups": own}))

    return Lowering(Sharded(_side_by_side(2 * num_groups, context.world_size), 1), emit)


@rule("disco.group_normalize")
def group_normalize(op: Op, context: RuleContext) -> Lowering | None:
    """Groups that ranks have whole need nothing of others; else the moments of all ranks."""
    placed, groups = context.sharded(op.args[0]), op.kwargs["groups"]
    if placed is None or placed.dim != 1:
        return None
    whole = op.kwargs["counts"]
    assert isinstance(groups, tuple) and isinstance(whole, tuple) and isinstance(whole[0], tuple)
    num_groups = len(whole[0])
    per_rank = [[groups[channel] for channel in own] for own in placed.ownership.channels]
    counts = tuple(tuple(own.count(group) for group in range(num_groups)) for own in per_rank)
    cut = any(sum(row[group] > 0 for row in counts) > 1 for group in range(num_groups))

    def attributes(channels: Sequence[int]) -> dict[str, Arg]:
        listed = tuple(groups[channel] for channel in channels)
        if cut:
            return {**op.kwargs, "groups": listed, "counts": counts}
        # Of the groups that a rank does not have it needs no sizes.
        return {**op.kwargs, "groups": listed}

    return _applied(op, placed, attributes, everywhere=cut)


def _applied(
    op: Op,
    placed: Sharded,
    attributes: Callable[[Sequence[int]], dict[str, Arg]],
    *,
    everywhere: bool,
) -> Lowering | None:
    """Statistics applied to a rank's own channels; to received ones too if all ranks have them."""
    x, given, weight, bias = op.args
    if not isinstance(given, Ref):
        return None

    def emit(op: Op, rank: RankBuilder) -> None:
        owned = placed.ownership
        scale, shift = (None if w is None else rank.part(w, owned, 0) for w in (weight, bias))
        args = (x, rank.whole(given) if everywhere else given, scale, shift)
        rank.add(Op(op.kind, op.name, args, attributes(owned.channels[rank.rank])))

    def replay(op: Op, rank: RankBuilder, piece: Ref, channels: tuple[int, ...], name: str) -> None:
        scale, shift = (
            rank.taken(w, channels) if isinstance(w, WeightRef) else None for w in (weight, bias)
        )
        rank.add(Op(op.kind, name, (piece, rank.whole(given), scale, shift), attributes(channels)))

    constant = not any(isinstance(w, Ref) for w in (weight, bias))
    return Lowering(
        placed,
        emit,
        whole=(given.name,) if everywhere else (),
        replay=replay if constant and everywhere else None,
    )


def _side_by_side(numbers: int, world_size: int) -> Ownership:
    """So many numbers of every rank."""
    return Ownership(tuple(tuple(range(numbers * r, numbers * (r + 1))) for r in range(world_size)))
