"""Ops that work on every element alone: each rank does its own channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from disco.partition.placement import Replicated, Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import (
    Lowering,
    RuleContext,
    missing,
    per_channel,
    rule,
    same_op,
)
from disco.program import Arg, Op, Ref, WeightRef

_UNARY = """
    _to_copy.default abs.default acos.default acosh.default add.Scalar asin.default
    asinh.default atan.default atanh.default bitwise_not.default ceil.default celu.default
    clamp.default clamp_max.default clamp_min.default copysign.Scalar cos.default cosh.default
    div.Scalar elu.default eq.Scalar erf.default erfc.default erfinv.default exp.default
    exp2.default expm1.default fill.Scalar floor.default fmod.Scalar frac.default
    full_like.default ge.Scalar gelu.default gt.Scalar hardshrink.default hardsigmoid.default
    hardswish.default hardtanh.default isfinite.default isinf.default isnan.default le.Scalar
    leaky_relu.default log.default log10.default log1p.default log2.default log_sigmoid.default
    logical_not.default logit.default lt.Scalar mish.default mul.Scalar nan_to_num.default
    ne.Scalar neg.default ones_like.default pow.Scalar pow.Tensor_Scalar reciprocal.default
    relu.default relu6.default remainder.Scalar round.default rsqrt.default rsub.Scalar
    selu.default sgn.default sigmoid.default sign.default silu.default sin.default sinc.default
    sinh.default softplus.default softshrink.default sqrt.default square.default sub.Scalar
    tan.default tanh.default threshold.default to.dtype trunc.default zero.default
    zeros_like.default
"""
_BINARY = """
    add.Tensor addcmul.default atan2.default bitwise_and.Tensor bitwise_or.Tensor
    bitwise_xor.Tensor copysign.Tensor div.Tensor eq.Tensor fmax.default fmin.default
    fmod.Tensor ge.Tensor gt.Tensor hypot.default le.Tensor logaddexp.default
    logical_and.default logical_or.default logical_xor.default lt.Tensor masked_fill.Scalar
    masked_fill.Tensor max.other maximum.default min.other minimum.default mul.Tensor ne.Tensor
    pow.Tensor_Tensor remainder.Tensor rsub.Tensor sub.Tensor where.self xlogy.Tensor
"""
UNARY_KINDS = tuple(f"aten.{name}" for name in _UNARY.split())
BINARY_KINDS = tuple(f"aten.{name}" for name in _BINARY.split())


@rule(*UNARY_KINDS)
def unary(op: Op, context: RuleContext) -> Lowering | None:
    """One tensor in, any numbers as attributes."""
    placed = context.sharded(op.args[0])
    if placed is None or len(list(op.refs())) != 1:
        return None
    return per_channel(placed)


@rule(*BINARY_KINDS)
def broadcast(op: Op, context: RuleContext) -> Lowering | None:
    """Several tensors, broadcast: all take the ownership of the first sharded one.

    A replicated operand is sliced (or left, where it has size 1 there); of a sharded one of
    another ownership every rank gets what it lacks.
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

    tensors = [arg for arg in op.args if isinstance(arg, Ref)]
    reshare, whole = missing([(arg, place_in(arg)) for arg in tensors], context)

    def emit(op: Op, rank: RankBuilder) -> None:
        def localise(arg: Arg) -> Arg:
            if not isinstance(arg, (Ref, WeightRef)):
                return arg
            wanted = place_in(arg)
            if wanted is not None:
                return rank.part(arg, wanted.ownership, wanted.dim)
            return rank.whole(arg) if isinstance(arg, Ref) else rank.keep(arg)

        rank.add(Op(op.kind, op.name, tuple(localise(arg) for arg in op.args), op.kwargs))

    return Lowering(target, emit, reshare=reshare, whole=whole)


@rule("aten.new_full.default", "aten.new_ones.default", "aten.new_zeros.default")
def new_like(op: Op, context: RuleContext) -> Lowering | None:
    """Of a tensor only its dtype and device are taken."""
    return same_op(Replicated()) if len(list(op.refs())) == 1 else None


@rule("disco.channel_affine", "aten.prelu.default", "aten.instance_norm.default")
def with_channel_weights(op: Op, context: RuleContext) -> Lowering | None:
    """Weights ``[C]`` along dim 1 (or one number for all channels), each channel alone."""
    placed = context.sharded(op.args[0])
    if placed is None or placed.dim != 1 or len(list(op.refs())) != 1:
        return None

    flat = range(placed.ownership.num_channels)

    def localised(rank: RankBuilder, channels: Sequence[int], op: Op, x: Ref, name: str) -> Op:
        def part(arg: Arg) -> Arg:
            if isinstance(arg, WeightRef) and len(rank.source(arg)) == len(flat):
                return rank.taken(arg, channels)
            return rank.localise(arg)

        return Op(op.kind, name, (x, *map(part, op.args[1:])), op.kwargs)

    def emit(op: Op, rank: RankBuilder) -> None:
        x, owned = op.args[0], placed.ownership.channels[rank.rank]
        assert isinstance(x, Ref)
        rank.add(localised(rank, owned, op, x, op.name))

    def replay(op: Op, rank: RankBuilder, piece: Ref, channels: tuple[int, ...], name: str) -> None:
        rank.add(localised(rank, channels, op, piece, name))

    return Lowering(placed, emit, replay=replay)


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
