"""Ops that move dimensions about: views, permutations, slices of other dimensions, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from disco.partition.placement import Replicated, Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.registry import Lowering, RuleContext, per_channel, rule, same_op
from disco.program import Arg, Op, Ref, WeightRef, evaluate_shape
from disco.program.symbols import symbols_of
from disco_kernels.pattern import Ownership

# Symbols get sizes that no product of a model's own sizes is likely to hit, to match dimensions by
# their numbers; the primes differ so that two symbols are never taken for each other.
_PROBES = (1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099)


@rule("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
def view(op: Op, context: RuleContext) -> Lowering | None:
    """Keeps the channels, merges dimensions into them from behind, or splits them in blocks."""
    placed = context.sharded(op.args[0])
    target = op.args[1]
    before, after = context.shape(op.args[0]), context.values[op.name].shape
    if placed is None or not isinstance(target, tuple):
        return None
    mapped = map_through_view(placed, before, after)
    return None if mapped is None else _resized(op, target, mapped, after)


@rule("aten.flatten.using_ints")
def flatten(op: Op, context: RuleContext) -> Lowering | None:
    """A view; its attributes need no change."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    mapped = map_through_view(placed, context.shape(op.args[0]), context.values[op.name].shape)
    return None if mapped is None else same_op(mapped)


@rule("aten.permute.default")
def permute(op: Op, context: RuleContext) -> Lowering | None:
    """The channels' dimension moves."""
    placed = context.sharded(op.args[0])
    order = op.args[1]
    if placed is None or not isinstance(order, tuple):
        return None
    dims = [dim % len(order) for dim in order if isinstance(dim, int)]
    return per_channel(Sharded(placed.ownership, dims.index(placed.dim)))


@rule("aten.expand.default", "aten.repeat.default")
def grow(op: Op, context: RuleContext) -> Lowering | None:
    """Other dimensions than the channels grow; new ones may come in front."""
    placed, sizes = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(sizes, tuple):
        return None
    before, after = context.shape(op.args[0]), context.values[op.name].shape
    dim = placed.dim + len(after) - len(before)
    if before[placed.dim] != after[dim]:
        return None
    # Of the channels there are as many as there are: -1 for expand, once for repeat.
    kept = -1 if op.kind == "aten.expand.default" else 1
    local = Op(op.kind, op.name, (op.args[0], (*sizes[:dim], kept, *sizes[dim + 1 :])), op.kwargs)

    def emit(op: Op, rank: RankBuilder) -> None:
        rank.add(local.replace_leaves(rank.localise))

    def replay(op: Op, rank: RankBuilder, piece: Ref, channels: tuple[int, ...], name: str) -> None:
        args = local.replace_leaves(rank.localise).args
        rank.add(Op(op.kind, name, (piece, *args[1:]), op.kwargs))

    return Lowering(Sharded(placed.ownership, dim), emit, replay=replay)


@rule("aten.transpose.int")
def transpose(op: Op, context: RuleContext) -> Lowering | None:
    """Two dimensions change places."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    num_dims = len(context.shape(op.args[0]))
    a, b = (dim % num_dims for dim in op.args[1:3] if isinstance(dim, int))
    moved = {a: b, b: a}.get(placed.dim, placed.dim)
    return per_channel(Sharded(placed.ownership, moved))


@rule("aten.unsqueeze.default")
def unsqueeze(op: Op, context: RuleContext) -> Lowering | None:
    """A new dimension of size 1."""
    placed, dim = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(dim, int):
        return None
    new = dim % (len(context.shape(op.args[0])) + 1)
    return per_channel(Sharded(placed.ownership, placed.dim + (new <= placed.dim)))


@rule("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(op: Op, context: RuleContext) -> Lowering | None:
    """Named dimensions of size 1 go; local unless the channels are among them."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    shape = context.shape(op.args[0])
    given: Sequence[Arg] = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    dims = {dim % len(shape) for dim in given if isinstance(dim, int)}
    if placed.dim in dims:
        return None
    gone = sum(dim < placed.dim and shape[dim] == 1 for dim in dims)
    return same_op(Sharded(placed.ownership, placed.dim - gone))


@rule("disco.take")
def take(op: Op, context: RuleContext) -> Lowering | None:
    """Listed entries of a dimension; of the channels every rank takes those that it owns."""
    placed, index = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(index, WeightRef):
        return None
    channels = taken_channels(op, context)
    return same_op(placed) if channels is None else _taken(op, placed, channels)


@rule("aten.slice.Tensor")
def slice_channels(op: Op, context: RuleContext) -> Lowering | None:
    """A run of the channels, or whatever of other dimensions."""
    placed = context.sharded(op.args[0])
    dim = op.args[1] if len(op.args) > 1 else 0
    if placed is None or not _is_dim(dim, placed.dim, op, context):
        return other_dims(op, context)
    channels = taken_channels(op, context)
    return None if channels is None else _taken(op, placed, channels)


def taken_channels(op: Op, context: RuleContext) -> Sequence[int] | None:
    """Which channels an op takes out of its sharded input, in order; None for any other op."""
    x = op.args[0] if op.args else None
    placed = context.sharded(x)
    if placed is None:
        return None
    if op.kind == "disco.take" and _is_dim(op.kwargs["dim"], placed.dim, op, context):
        index = op.args[1]
        if not isinstance(index, WeightRef):
            return None
        return [int(c) for c in context.weights[index.name].tolist()]
    if op.kind != "aten.slice.Tensor" or op.kwargs:
        return None
    given = (*op.args[1:], *(0, None, None, 1)[len(op.args) - 1 :])
    bounds = [bound for bound in given[1:4] if bound is None or isinstance(bound, int)]
    if not _is_dim(given[0], placed.dim, op, context) or len(bounds) != 3:
        return None
    first, end, step = bounds
    return range(placed.ownership.num_channels)[first:end:step]


def _is_dim(given: Arg, dim: int, op: Op, context: RuleContext) -> bool:
    return isinstance(given, int) and given % len(context.shape(op.args[0])) == dim


def _taken(op: Op, placed: Sharded, channels: Sequence[int]) -> Lowering:
    """``channels`` of a sharded dimension, in this order, become 0, 1, ...; each stays where it is.

    A rank keeps its own in the order in which it has them, so nothing moves if all are taken.
    """
    made: dict[int, list[int]] = {}
    for new, old in enumerate(channels):
        made.setdefault(old, []).append(new)
    ranks, local = [], []
    for owned in placed.ownership.channels:
        kept = [(i, new) for i, old in enumerate(owned) for new in made.get(old, ())]
        local.append([i for i, _ in kept])
        ranks.append(tuple(new for _, new in kept))

    def emit(op: Op, rank: RankBuilder) -> None:
        positions = torch.tensor(local[rank.rank], dtype=torch.int32)
        index = rank.store(f"{op.name}.own", positions)
        rank.add(Op("disco.take", op.name, (op.args[0], index), {"dim": placed.dim}))

    return Lowering(Sharded(Ownership(tuple(ranks)), placed.dim), emit)


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(op: Op, context: RuleContext) -> Lowering | None:
    """``[.., C * r * r, H, W] -> [.., C, H * r, W * r]``: local by whole output channels."""
    placed, factor = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(factor, int):
        return None
    num_dims = len(context.shape(op.args[0]))
    if placed.dim >= num_dims - 2:
        return None
    if placed.dim < num_dims - 3:
        return same_op(placed)
    blocks = contracted(placed.ownership, factor * factor)
    return None if blocks is None else same_op(Sharded(blocks, placed.dim))


@rule("aten.roll.default", "aten.flip.default", "aten.sym_size.int")
def other_dims(op: Op, context: RuleContext) -> Lowering | None:
    """Works on other dimensions than the channels."""
    placed = context.sharded(op.args[0])
    if placed is None:
        return None
    position = 2 if op.kind == "aten.roll.default" else 1
    given = op.args[position] if len(op.args) > position else 0
    named: Sequence[Arg] = given if isinstance(given, tuple) else (given,)
    dims = {dim % len(context.shape(op.args[0])) for dim in named if isinstance(dim, int)}
    if not dims or placed.dim in dims:
        return None
    if op.kind == "aten.sym_size.int":
        return same_op(Replicated())  # a number, the same on every rank
    return same_op(placed)


@rule("aten.select.int")
def select(op: Op, context: RuleContext) -> Lowering | None:
    """One entry of another dimension, which goes."""
    placed, dim = context.sharded(op.args[0]), op.args[1]
    if placed is None or not isinstance(dim, int):
        return None
    gone = dim % len(context.shape(op.args[0]))
    if gone == placed.dim:
        return None
    return same_op(Sharded(placed.ownership, placed.dim - (gone < placed.dim)))


def map_through_view(
    placed: Sharded, before: Sequence[int | str], after: Sequence[int | str]
) -> Sharded | None:
    """Where the channels are after a view; None if that is no dimension of their own, nor one of
    them and others that are merged with them whole.

    Dimensions are matched in groups of equal products: ``[B, C, 7, 7] -> [B, C * 49]`` has the
    groups ``[B] -> [B]`` and ``[C, 7, 7] -> [C * 49]``.
    """
    found = view_groups(before, after)
    if found is None:
        return None
    old, new, groups = found
    for (start, stop), (new_start, new_stop) in groups:
        if start <= placed.dim < stop:
            if prod(old[start : placed.dim]) != 1:
                return _merged_from_before(placed, old, start, stop, after, new_start, new_stop)
            return _map_in_group(placed, old, start, stop, new, new_start, new_stop)
    return None


def _merged_from_before(
    placed: Sharded,
    old: Sequence[int],
    start: int,
    stop: int,
    after: Sequence[int | str],
    new_start: int,
    new_stop: int,
) -> Sharded | None:
    """``[2, 2, C] -> [4 * C]``, as where neighbouring pixels become channels: every rank has its
    channels of each. Not of images: their number is open."""
    sizes = [size for size in after[new_start:new_stop] if size != 1]
    if len(sizes) != 1 or not isinstance(sizes[0], int):
        return None
    dim = new_start + list(after[new_start:new_stop]).index(sizes[0])
    before, behind = prod(old[start : placed.dim]), prod(old[placed.dim + 1 : stop])
    channels = placed.ownership.num_channels
    ranks = tuple(
        tuple(
            (outer * channels + c) * behind + inner
            for outer in range(before)
            for c in owned
            for inner in range(behind)
        )
        for owned in placed.ownership.channels
    )
    return Sharded(Ownership(ranks), dim)


Group = tuple[tuple[int, int], tuple[int, int]]


def view_groups(
    before: Sequence[int | str], after: Sequence[int | str]
) -> tuple[Sequence[int], Sequence[int], list[Group]] | None:
    """Both shapes of a view in numbers, and the runs of dimensions that match; None if unknown."""
    names = symbols_of((*before, *after))
    if len(names) > len(_PROBES):
        return None
    probes = dict(zip(names, _PROBES, strict=False))
    old, new = evaluate_shape(before, probes), evaluate_shape(after, probes)
    return None if 0 in old else (old, new, _groups(old, new))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[Group]:
    """The finest matching runs of dimensions: ``((start, stop), (new_start, new_stop))``."""
    groups = []
    start = new_start = i = j = 0
    left = right = 1
    while i < len(old) or j < len(new):
        if left <= right and i < len(old):
            left, i = left * old[i], i + 1
        elif j < len(new):
            right, j = right * new[j], j + 1
        else:
            left, i = left * old[i], i + 1
        if left == right and i > start and j > new_start:
            groups.append(((start, i), (new_start, j)))
            start, new_start, left, right = i, j, 1, 1
    if groups and (start < len(old) or new_start < len(new)):
        # What is left over has size 1 and joins the last group.
        (first, _), (new_first, _) = groups.pop()
        groups.append(((first, len(old)), (new_first, len(new))))
    return groups


def _map_in_group(
    placed: Sharded,
    old: Sequence[int],
    start: int,
    stop: int,
    new: Sequence[int],
    new_start: int,
    new_stop: int,
) -> Sharded | None:
    """The channels come first in the group, up to dimensions of size 1, or they are all of it."""
    behind = prod(old[placed.dim + 1 : stop])
    if behind == 1:
        # [3 * heads * 64] -> [3, heads, 64] by heads: every rank's channels are such a product.
        for dim in range(new_start, new_stop):
            if new[dim] == 1 or prod(new[new_start:dim]) == 1:
                continue
            inner = prod(new[dim + 1 : new_stop])
            owned = _along(placed.ownership, new[dim], inner)
            if owned is not None:
                return Sharded(owned, dim)
    lead = next((d for d in range(new_start, new_stop) if new[d] != 1), new_start)
    channels = placed.ownership.num_channels
    if new[lead] == channels and lead < new_stop:
        return Sharded(placed.ownership, lead)
    if new[lead] % channels == 0 and (channels * behind) % new[lead] == 0:
        return Sharded(expanded(placed.ownership, new[lead] // channels), lead)
    if channels % new[lead] == 0:
        blocks = contracted(placed.ownership, channels // new[lead])
        return None if blocks is None else Sharded(blocks, lead)
    return None


def _along(ownership: Ownership, size: int, inner: int) -> Ownership | None:
    """Channels seen as ``[outer, size, inner]``: who owns what along the middle, if every rank has
    all of the others of what it has, in order."""
    outer = ownership.num_channels // (size * inner)
    ranks = []
    for channels in ownership.channels:
        own = tuple(c // inner for c in channels[: len(channels) // outer : inner])
        if channels != tuple(
            (before * size + middle) * inner + behind
            for before in range(outer)
            for middle in own
            for behind in range(inner)
        ) or any(middle >= size for middle in own):
            return None
        ranks.append(own)
    return Ownership(tuple(ranks))


def expanded(ownership: Ownership, factor: int) -> Ownership:
    """Every channel as `factor` consecutive ones."""
    return Ownership(
        tuple(
            tuple(c * factor + k for c in owned for k in range(factor))
            for owned in ownership.channels
        )
    )


def contracted(ownership: Ownership, block: int) -> Ownership | None:
    """Blocks of `block` consecutive channels as one; None if a rank owns part of one."""
    ranks = []
    for owned in ownership.channels:
        starts = owned[::block]
        if owned != tuple(s + k for s in starts for k in range(block)) or any(
            s % block for s in starts
        ):
            return None
        ranks.append(tuple(s // block for s in starts))
    return Ownership(tuple(ranks))


def _resized(
    op: Op, target: tuple[Arg, ...], mapped: Sharded, after: Sequence[int | str]
) -> Lowering:
    """The view with the rank's own number of channels in its target shape."""

    def emit(op: Op, rank: RankBuilder) -> None:
        count = mapped.ownership.counts[rank.rank]
        # -1 would be ambiguous on a rank without channels; the captured shape knows most sizes.
        sizes = tuple(
            known if given == -1 and isinstance(known, int) else given
            for given, known in zip(target, after, strict=True)
        )
        local = (*sizes[: mapped.dim], count, *sizes[mapped.dim + 1 :])
        rank.add(Op(op.kind, op.name, (op.args[0], local)))

    return Lowering(mapped, emit)
