"""Attention: each rank computes its own heads."""

from __future__ import annotations

from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Op, Ref


@rule("aten.scaled_dot_product_attention.default")
def attention(op: Op, context: RuleContext) -> Lowering | None:
    """``softmax(q k') v`` over the last two dimensions: local by heads, which all three share.

    A mask may be given if it is the same for all heads.
    """
    query, key, value, *rest = op.args
    placed = context.sharded(query)
    num_dims = len(context.shape(query))
    if placed is None or placed.dim >= num_dims - 2:
        return None
    if any(context.sharded(x) != placed for x in (key, value)):
        return None
    mask = rest[0] if rest else op.kwargs.get("attn_mask")
    if isinstance(mask, Ref):
        shape = context.shape(mask)
        dim = placed.dim - (num_dims - len(shape))
        if context.sharded(mask) is not None or (dim >= 0 and shape[dim] != 1):
            return None
    return same_op(placed)


@rule("aten.matmul.default", "aten.bmm.default")
def batched_matmul(op: Op, context: RuleContext) -> Lowering | None:
    """Products of two values, local along a dimension before the last two that both share."""
    a, b = op.args[:2]
    placed = context.sharded(a)
    if placed is None or context.sharded(b) != placed:
        return None
    num_dims = len(context.shape(a))
    if len(context.shape(b)) != num_dims or placed.dim >= num_dims - 2:
        return None
    return same_op(placed)
