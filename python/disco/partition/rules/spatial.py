"""Ops that work on each channel's map alone: pooling, padding, up-sampling, means."""

from __future__ import annotations

from collections.abc import Sequence

from disco.partition.placement import Sharded
from disco.partition.rules.registry import Lowering, RuleContext, per_channel, rule, same_op
from disco.program import Arg, Op


@rule(
    "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_max_pool2d.default",
    "aten.avg_pool2d.default",
    "aten.max_pool2d.default",
    "aten.reflection_pad2d.default",
    "aten.replication_pad2d.default",
    "aten.upsample_bicubic2d.vec",
    "aten.upsample_bilinear2d.default",
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_nearest2d.default",
    "aten.upsample_nearest2d.vec",
)
def over_maps(op: Op, context: RuleContext) -> Lowering | None:
    """Works on the last two dimensions of ``[B, C, H, W]``."""
    placed = context.sharded(op.args[0])
    keeps = placed is not None and placed.dim < len(context.shape(op.args[0])) - 2
    return per_channel(placed) if placed is not None and keeps else None


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(op: Op, context: RuleContext) -> Lowering | None:
    """Pads the last ``len(amounts) / 2`` dimensions; local unless that includes the channels."""
    placed = context.sharded(op.args[0])
    amounts = op.args[1]
    if placed is None or not isinstance(amounts, tuple):
        return None
    from_the_end = len(context.shape(op.args[0])) - 1 - placed.dim
    around_channels = amounts[2 * from_the_end : 2 * from_the_end + 2]
    return per_channel(placed) if all(amount == 0 for amount in around_channels) else None


@rule("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default")
def reduce(op: Op, context: RuleContext) -> Lowering | None:
    """Reduction over dimensions other than the channels."""
    return _reduced(op, context, position=1)


@rule("aten.linalg_vector_norm.default")
def vector_norm(op: Op, context: RuleContext) -> Lowering | None:
    """A norm over dimensions other than the channels."""
    return _reduced(op, context, position=2)


def _reduced(op: Op, context: RuleContext, position: int) -> Lowering | None:
    """The dimensions that go are the argument at ``position``, whether they stay as 1 the next."""
    placed = context.sharded(op.args[0])
    dims = _dims(
        op.args[position] if len(op.args) > position else (), len(context.shape(op.args[0]))
    )
    if placed is None or not dims or placed.dim in dims:
        return None
    after = op.args[position + 1 :]
    keepdim = after[0] if after else op.kwargs.get("keepdim", False)
    gone = 0 if keepdim else sum(dim < placed.dim for dim in dims)
    return same_op(Sharded(placed.ownership, placed.dim - gone))


@rule("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten.cumsum.default")
def along_one_dim(op: Op, context: RuleContext) -> Lowering | None:
    """Works along one dimension; local unless that is the channels."""
    placed = context.sharded(op.args[0])
    dims = _dims(op.args[1], len(context.shape(op.args[0])))
    return same_op(placed) if placed is not None and placed.dim not in dims else None


@rule("aten.layer_norm.default")
def layer_norm(op: Op, context: RuleContext) -> Lowering | None:
    """Normalises the last dimensions; local unless the channels are among them."""
    placed = context.sharded(op.args[0])
    normalized = op.args[1]
    if placed is None or not isinstance(normalized, tuple):
        return None
    first = len(context.shape(op.args[0])) - len(normalized)
    return same_op(placed) if placed.dim < first else None


def _dims(arg: Arg, num_dims: int) -> set[int]:
    """Dimensions named by an attribute, counted from the front; empty if it names none."""
    values: Sequence[Arg] = arg if isinstance(arg, tuple) else (arg,)
    return {dim % num_dims for dim in values if isinstance(dim, int)}
