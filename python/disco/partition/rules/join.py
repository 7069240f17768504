"""Joining: along the channels each rank joins its own, and ownership is no longer a range."""

from __future__ import annotations

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, missing, rule
from disco.program import Arg, Op, Ref, WeightRef
from disco_kernels.pattern import Ownership


@rule("aten.cat.default")
def cat(op: Op, context: RuleContext) -> Lowering | None:
    """Pieces that are sharded over the same dimension; replicated pieces are sliced."""
    pieces = op.args[0]
    if not isinstance(pieces, tuple):
        return None
    num_dims = len(context.values[op.name].shape)
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    first = next(placed for piece in pieces if (placed := context.sharded(piece)) is not None)
    if not isinstance(given, int) or any(len(context.shape(p)) != num_dims for p in pieces):
        return None
    along = given % num_dims
    if along == first.dim:
        wanted = [_own(piece, context, along) for piece in pieces]
        ownership = _joined(wanted, context.world_size)
    else:
        wanted = [first.ownership for _ in pieces]
        ownership = first.ownership
    placements = [Sharded(owned, first.dim) for owned in wanted]
    reshare, whole = missing(zip(pieces, placements, strict=True), context)

    def emit(op: Op, rank: RankBuilder) -> None:
        parts = tuple(
            rank.part(piece, placement.ownership, placement.dim)
            for piece, placement in zip(pieces, placements, strict=True)
        )
        rank.add(Op(op.kind, op.name, (parts, along)))

    return Lowering(Sharded(ownership, first.dim), emit, reshare=reshare, whole=whole)


@rule("aten.stack.default")
def stack(op: Op, context: RuleContext) -> Lowering | None:
    """Equal shapes along a new dimension: all take the ownership of the first sharded one."""
    pieces = op.args[0]
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    if not isinstance(pieces, tuple) or not isinstance(given, int):
        return None
    placed = next(found for piece in pieces if (found := context.sharded(piece)) is not None)
    along = given % len(context.values[op.name].shape)
    whole = tuple(
        piece.name
        for piece in pieces
        if isinstance(piece, Ref) and context.sharded(piece) not in (None, placed)
    )

    def emit(op: Op, rank: RankBuilder) -> None:
        parts = tuple(rank.part(piece, placed.ownership, placed.dim) for piece in pieces)
        rank.add(Op(op.kind, op.name, (parts, along)))

    dim = placed.dim + (along <= placed.dim)
    return Lowering(Sharded(placed.ownership, dim), emit, whole=whole)


def _own(piece: Arg, context: RuleContext, dim: int) -> Ownership:
    """A piece's ownership along `dim`: its own, or the ranks' shares if it has none there."""
    assert isinstance(piece, (Ref, WeightRef))
    placed = context.sharded(piece)
    if placed is not None and placed.dim == dim:
        return placed.ownership
    return context.share_out(piece.name, int(context.shape(piece)[dim]))


def _joined(pieces: list[Ownership], world_size: int) -> Ownership:
    """Per rank its channels of every piece, counted through."""
    channels: list[tuple[int, ...]] = [() for _ in range(world_size)]
    offset = 0
    for piece in pieces:
        for rank, owned in enumerate(piece.channels):
            channels[rank] += tuple(offset + channel for channel in owned)
        offset += piece.num_channels
    return Ownership(tuple(channels))
