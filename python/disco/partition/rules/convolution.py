"""Convolutions. Grouped and depthwise ones are local where every group's inputs are on one rank."""

from __future__ import annotations

from disco.errors import InputError
from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.matrix import matrix_flops, split_outputs
from disco.partition.rules.registry import Lowering, RuleContext, missing, rule
from disco.program import Op, WeightRef
from disco_kernels.pattern import Ownership


@rule("disco.conv2d")
def conv2d(op: Op, context: RuleContext) -> Lowering | None:
    """``[B, C, H, W]``, channels in dim 1."""
    if op.kwargs["groups"] == 1:
        return split_outputs(op, context, "disco.partial_conv2d", in_dim=1, out_dim=1)
    return _grouped(op, context)


def _grouped(op: Op, context: RuleContext) -> Lowering | None:
    x, weight, bias, residual = op.args
    placed = context.sharded(x)
    groups = op.kwargs["groups"]
    assert isinstance(weight, WeightRef) and isinstance(groups, int)
    if placed is None or placed.dim != 1:
        return None
    outputs, inputs_per_group = (int(size) for size in context.shape(weight)[:2])
    outputs_per_group = outputs // groups
    owned_groups = [_whole_groups(owned, inputs_per_group) for owned in placed.ownership.channels]
    out_channels = []
    for owned in owned_groups:
        if owned is None:
            return None
        out_channels.append(
            tuple(g * outputs_per_group + o for g in owned for o in range(outputs_per_group))
        )
    out = Ownership(tuple(out_channels))
    layer = context.layer_of(op)
    fixed = context.out_ownership.get(layer, out)
    if [set(owned) for owned in fixed.channels] != [set(owned) for owned in out.channels]:
        raise InputError(
            f"layer {layer!r} is a grouped convolution, which keeps the ownership of its input; "
            f"leave it out of the ownership given, and fix that of the layer before it"
        )
    reshare, whole = missing([(residual, Sharded(out, 1))], context)

    def emit(op: Op, rank: RankBuilder) -> None:
        args = (
            x,
            rank.part(weight, out, 0),
            None if bias is None else rank.part(bias, out, 0),
            None if residual is None else rank.part(residual, out, 1),
        )
        local_groups = len(owned_groups[rank.rank] or ())
        rank.add(Op(op.kind, op.name, args, {**op.kwargs, "groups": local_groups}))

    return Lowering(
        placement=Sharded(out, 1),
        emit=emit,
        reshare=reshare,
        whole=whole,
        flops=tuple(matrix_flops(op, context, count, inputs_per_group) for count in out.counts),
        out_ownership=out,
        in_ownership=placed.ownership,
        selected=tuple(((),) * context.world_size for _ in range(context.world_size)),
    )


def _whole_groups(channels: tuple[int, ...], group_size: int) -> list[int] | None:
    """The groups that `channels` consist of, in their order; None if it is not whole groups."""
    if len(channels) % group_size:
        return None
    groups = []
    for start in range(0, len(channels), group_size):
        run = channels[start : start + group_size]
        if run[0] % group_size or run != tuple(range(run[0], run[0] + group_size)):
            return None
        groups.append(run[0] // group_size)
    return groups
