"""Attention: each rank computes its own heads."""

from __future__ import annotations

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, rule, same_op
from disco.program import Op, Ref, WeightRef


@rule("aten.scaled_dot_product_attention.default")
def attention(op: Op, context: RuleContext) -> Lowering | None:
    """``softmax(q k') v`` over the last two dimensions: local by heads, which all three share.

    A mask may be given: the same for all heads, or one that every rank has for its own.
    """
    query, key, value, *rest = op.args
    placed = context.sharded(query)
    num_dims = len(context.shape(query))
    if placed is None or placed.dim >= num_dims - 2:
        return None
    if any(context.sharded(x) != placed for x in (key, value)):
        return None
    mask = rest[0] if rest else op.kwargs.get("attn_mask")
    if not isinstance(mask, (Ref, WeightRef)):
        return same_op(placed)
    shape = context.shape(mask)
    dim = placed.dim - (num_dims - len(shape))
    per_head = dim >= 0 and shape[dim] != 1
    if context.sharded(mask) not in (None, Sharded(placed.ownership, dim) if per_head else None):
        return None

    def emit(op: Op, rank: RankBuilder) -> None:
        local = op.replace_leaves(rank.localise)
        part = rank.part(mask, placed.ownership, dim) if per_head else rank.localise(mask)
        args, attributes = [*local.args], {**local.kwargs}
        if rest:
            args[3] = part
        else:
            attributes["attn_mask"] = part
        rank.add(Op(op.kind, op.name, tuple(args), attributes))

    return Lowering(placed, emit)


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


@rule("aten.einsum.default")
def einsum(op: Op, context: RuleContext) -> Lowering | None:
    """Local along a letter that stays, if every operand that has it is shared out alike."""
    equation, operands = op.args[0], op.args[1]
    if not isinstance(equation, str) or not isinstance(operands, tuple):
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    letters = given.split(",")
    if not arrow or "." in equation or len(letters) != len(operands):
        return None
    kept = ""
    ownership = None
    for subscript, operand in zip(letters, operands, strict=True):
        placed = context.sharded(operand)
        if placed is not None:
            kept, ownership = subscript[placed.dim], placed.ownership
            break
    if ownership is None or result.count(kept) != 1:
        return None
    for subscript, operand in zip(letters, operands, strict=True):
        placed = context.sharded(operand)
        wanted = Sharded(ownership, subscript.index(kept)) if kept in subscript else None
        if placed != wanted or subscript.count(kept) > 1:
            return None
    return same_op(Sharded(ownership, result.index(kept)))
