"""Ops that work on every element alone: each rank does its own channels."""

from __future__ import annotations

from math import prod

from disco.partition.placement import Replicated, Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Arg, Op, Ref, WeightRef

_UNARY = """
    _to_copy.default abs.default add.Scalar ceil.default clamp.default clamp_max.default
    clamp_min.default cos.default div.Scalar elu.default eq.Scalar erf.default exp.default
    expm1.default fill.Scalar floor.default full_like.default ge.Scalar gelu.default gt.Scalar
    hardsigmoid.default hardswish.default hardtanh.default le.Scalar leaky_relu.default
    log.default log1p.default logical_not.default lt.Scalar mish.default mul.Scalar ne.Scalar
    neg.default ones_like.default pow.Scalar pow.Tensor_Scalar reciprocal.default relu.default
    relu6.default round.default rsqrt.default rsub.Scalar selu.default sigmoid.default
    sign.default silu.default sin.default softplus.default sqrt.default sub.Scalar tan.default
    tanh.default to.dtype zero.default zeros_like.default
"""
_BINARY = """
    add.Tensor addcmul.default div.Tensor eq.Tensor ge.Tensor gt.Tensor le.Tensor
    logical_and.default logical_or.default lt.Tensor masked_fill.Scalar masked_fill.Tensor
    maximum.default minimum.default mul.Tensor ne.Tensor pow.Tensor_Tensor rsub.Tensor
    sub.Tensor where.self
"""


@rule(*(f"aten.{name}" for name in _UNARY.split()))
def unary(op: Op, context: RuleContext) -> Lowering | None:
    """One tensor in, any numbers as attributes."""
    placed = context.sharded(op.args[0])
    if placed is None or len(list(op.refs())) != 1:
        return None
    return same_op(placed)


@rule(*(f"aten.{name}" for name in _BINARY.split()))
def broadcast(op: Op, context: RuleContext) -> Lowering | None:
    """Several tensors, broadcast: all take the ownership of the first sharded one.

    A replicated operand is sliced (or left, where it has size 1 there); a sharded one of another
    ownership is gathered and sliced.
    """
    num_dims = len(context.values[op.name].shape)
    target = _common_placement(op, context, num_dims)
    if target is None:
        return None

    def place_in(arg: Arg) -> Sharded | None:
        """How `arg` has to lie; None if it has no entry per channel."""
        shape = context.shape(arg)
        dim = target.dim - (num_dims - len(shape))
        per_channel = dim >= 0 and (shape[dim] != 1 or target.ownership.num_channels == 1)
        return Sharded(target.ownership, dim) if per_channel else None

    whole = []
    for arg in op.args:
        placed = context.sharded(arg)
        if isinstance(arg, Ref) and placed is not None and placed != place_in(arg):
            whole.append(arg.name)

    def emit(op: Op, rank: RankBuilder) -> None:
        def localise(arg: Arg) -> Arg:
            if not isinstance(arg, (Ref, WeightRef)):
                return arg
            wanted = place_in(arg)
            if wanted is not None:
                return rank.part(arg, wanted.ownership, wanted.dim)
            return rank.whole(arg) if isinstance(arg, Ref) else rank.keep(arg)

        rank.add(Op(op.kind, op.name, tuple(localise(arg) for arg in op.args), op.kwargs))

    return Lowering(target, emit, whole=tuple(whole))


@rule("aten.new_full.default", "aten.new_ones.default", "aten.new_zeros.default")
def new_like(op: Op, context: RuleContext) -> Lowering | None:
    """Of a tensor only its dtype and device are taken."""
    return same_op(Replicated()) if len(list(op.refs())) == 1 else None


@rule("disco.channel_affine")
def channel_affine(op: Op, context: RuleContext) -> Lowering | None:
    """Scale and shift of a batch norm: ``[C]`` along dim 1."""
    x, scale, shift = op.args
    placed = context.sharded(x)
    if placed is None or placed.dim != 1:
        return None

    def emit(op: Op, rank: RankBuilder) -> None:
        owned = placed.ownership
        args = (x, rank.part(scale, owned, 0), rank.part(shift, owned, 0))
        rank.add(Op(op.kind, op.name, args, op.kwargs))

    return Lowering(placed, emit)


def _common_placement(op: Op, context: RuleContext, num_dims: int) -> Sharded | None:
    """The result's placement: that of the operands sharded over a full dimension which would cost
    most to gather; of a gate and a map it is the map's."""
    out_shape = context.values[op.name].shape
    found: dict[Sharded, int] = {}
    for arg in op.args:
        placed = context.sharded(arg)
        if placed is not None and isinstance(arg, Ref):
            dim = placed.dim + num_dims - len(context.shape(arg))
            if context.shape(arg)[placed.dim] == out_shape[dim]:
                target = Sharded(placed.ownership, dim)
                found[target] = found.get(target, 0) + prod(context.sizes(arg.name))
    return max(found, key=lambda target: found[target]) if found else None


@rule("aten.prelu.default")
def prelu(op: Op, context: RuleContext) -> Lowering | None:
    """Local; a slope for every channel, second in the input, is shared out like the channels."""
    x, slope = op.args
    placed = context.sharded(x)
    if placed is None or not isinstance(slope, WeightRef):
        return None
    if placed.dim != 1 or prod(context.shape(slope)) == 1:
        return same_op(placed)

    def emit(op: Op, rank: RankBuilder) -> None:
        rank.add(Op(op.kind, op.name, (x, rank.part(slope, placed.ownership, 0)), op.kwargs))

    return Lowering(placed, emit)
