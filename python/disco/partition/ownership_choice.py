"""Who computes which outputs of a layer, where what follows can only be split in certain ways.

Attention is split by whole heads, a grouped convolution by whole groups. The outputs of the layer
before are then shared out in such units; cut through them, the values would have to be gathered.
Candidates are read off the ops that follow, up to the next layers; each is tried by asking the
rules, and the one that moves the fewest bytes is taken; of equal ones the one that leaves every
rank its share of what is cut out behind it (ShuffleNet hands half of its channels on, block after
block: shared out in runs, all of them would soon be one rank's). Plain contiguous shares come
first, so nothing changes where they do as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from disco.partition.placement import Placement, Replicated, Sharded
from disco.partition.rules import RuleContext, lower
from disco.partition.rules.reshape import view_groups
from disco.partition.shares import share_out
from disco.program import Op, Program, Ref, WeightRef
from disco_kernels.pattern import Ownership, Selected

_TRANSPOSED = ("aten.transpose.int", "aten.permute.default")
# Ops that are looked at after a layer. Attention takes some twenty.
_REACH = 64


class OwnershipChoice:
    """Chooses for the layers of one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._readers: dict[str, list[int]] = {}
        self._kinds = {op.name: op.kind for op in program.ops}
        for i, op in enumerate(program.ops):
            for name in dict.fromkeys(op.refs()):
                self._readers.setdefault(name, []).append(i)

    def choose(self, op: Op, dim: int, context: RuleContext) -> Ownership | None:
        """The ownership of the outputs of ``op`` along ``dim``; None for plain shares.

        Args:
            op: a convolution without groups or a linear, whose outputs nothing else decides.
            context: with everything that comes before ``op`` placed.
        """
        channels = context.shape(Ref(op.name))[dim]
        assert isinstance(channels, int)
        followers = self._followers(op)
        plain = context.share_out(op.name, channels)
        candidates = [
            c
            for c in dict.fromkeys(self._candidates(op, dim, followers, channels, context))
            if c != plain
        ]
        if not candidates:
            return None
        best, least = None, self._cost(op, plain, dim, followers, context)
        for candidate in candidates:
            cost = self._cost(op, candidate, dim, followers, context)
            if cost < least:
                best, least = candidate, cost
        return best

    def _followers(self, op: Op) -> list[Op]:
        """What depends on ``op``, in order, layers included but nothing behind them."""
        found: set[int] = set()
        names = [op.name]
        while names and len(found) < _REACH:
            for i in self._readers.get(names.pop(), ()):
                if i not in found:
                    found.add(i)
                    if not self._ends(self._program.ops[i]):
                        names.append(self._program.ops[i].name)
        return [self._program.ops[i] for i in sorted(found)]

    def _ends(self, op: Op) -> bool:
        """Whether an op makes channels of its own. A linear mixes tokens instead where its input
        has just been transposed."""
        return _is_layer(op) and not (
            op.kind == "disco.linear" and self._kinds.get(next(op.refs())) in _TRANSPOSED
        )

    def _candidates(
        self,
        op: Op,
        dim: int,
        followers: Sequence[Op],
        channels: int,
        context: RuleContext,
    ) -> Iterator[Ownership]:
        """Whole units along every factor that the channels are seen to have, the ownership of
        what they meet, and channels dealt out one by one where runs of them are cut out."""
        # Equal parts of the channels that are cut out, as queries, keys and values may be.
        parts = {channels}
        for follower in followers:
            if follower.kind == "aten.slice.Tensor":
                size = self._program.values[follower.name].shape[-1 if dim > 1 else dim]
                if isinstance(size, int) and size and channels % size == 0:
                    parts.add(size)
        for part in sorted(parts - {channels}):
            yield in_units((channels // part, part), 1, context.weights_of_ranks(op.name))
        for follower in followers:
            for part in sorted(parts):
                for factors, place in self._units(follower, part):
                    whole = (channels // part, *factors)
                    yield in_units(whole, place + 1, context.weights_of_ranks(op.name))
            if self._ends(follower):
                continue
            for name in follower.refs():
                met = context.placements.get(name)
                if (
                    isinstance(met, Sharded)
                    and met.ownership.num_channels == channels
                    and not _joins(follower, met.dim, context)
                ):
                    yield met.ownership
        if any(follower.kind == "aten.slice.Tensor" for follower in followers):
            weights = context.weights_of_ranks(op.name)
            yield dealt_out(channels, range(context.world_size), weights)
            yield dealt_out(channels, range(context.world_size)[::-1], weights)

    def _units(self, op: Op, channels: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Ways to see the channels as a product of factors, and which of them may be shared out."""
        if op.kind == "disco.conv2d" and op.kwargs["groups"] != 1:
            groups = op.kwargs["groups"]
            assert isinstance(groups, int)
            inputs = self._program.values[next(op.refs())].shape[1]
            if inputs == channels and 1 < groups < channels and channels % groups == 0:
                yield (groups, channels // groups), 0
        elif op.kind == "disco.group_moments":
            groups = op.kwargs["num_groups"]
            assert isinstance(groups, int)
            if self._program.values[next(op.refs())].shape[1] == channels:
                yield (groups, channels // groups), 0
        elif op.kind == "aten.pixel_shuffle.default":
            factor = op.args[1]
            assert isinstance(factor, int)
            if channels % factor**2 == 0:
                yield (channels // factor**2, factor**2), 0
        elif op.kind in ("aten.view.default", "aten.reshape.default"):
            before, after = (
                self._program.values[name].shape for name in (next(op.refs()), op.name)
            )
            factors = _split_of(before, after, channels)
            yield from ((factors, place) for place, n in enumerate(factors) if n > 1)

    def _cost(
        self,
        op: Op,
        ownership: Ownership,
        dim: int,
        followers: Sequence[Op],
        context: RuleContext,
    ) -> tuple[int, float]:
        """Elements that one image moves: for the layer itself, and gathered by what follows; then
        how far the ranks' parts of what is cut out of the channels are off their shares."""
        placements: dict[str, Placement] = {**context.placements}
        placements[op.name] = Sharded(ownership, dim)
        trial = replace(context, placements=placements)
        moved = _selected_elements(op, ownership, context)
        weights, uneven = context.weights_of_ranks(op.name), 0.0
        gathered: set[str] = set()
        for follower in followers:
            if self._ends(follower):
                continue
            for name in follower.refs():
                if name not in placements:
                    placements[name] = _expected(name, follower, trial)
            lowering = lower(follower, trial)
            placements[follower.name] = lowering.placement
            gathered.update(lowering.whole)
            if follower.kind == "aten.slice.Tensor" and isinstance(lowering.placement, Sharded):
                uneven += _off_shares(lowering.placement.ownership, weights)
            for name, table in lowering.reshare.items():
                moved += _elements(name, table, trial)
        for name in gathered:
            moved += (context.world_size - 1) * prod(context.sizes(name))
        return moved, uneven


def _expected(name: str, op: Op, context: RuleContext) -> Placement:
    """Of a value on a branch that comes later and meets this one in ``op``: as what it meets, since
    its layer is chosen for that then (queries, keys and values of layers of their own)."""
    shape = context.values[name].shape
    for other in op.refs():
        met = context.placements.get(other)
        if not isinstance(met, Sharded) or len(shape) != len(context.values[other].shape):
            continue
        if _joins(op, met.dim, context):
            continue
        if shape[met.dim] == met.ownership.num_channels:
            return met
    return Replicated()


def _is_layer(op: Op) -> bool:
    return op.kind == "disco.linear" or (op.kind == "disco.conv2d" and op.kwargs["groups"] == 1)


def _joins(op: Op, dim: int, context: RuleContext) -> bool:
    """Whether an op puts channels of ``dim`` behind each other, so that they do not meet."""
    along = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    return (
        op.kind == "aten.cat.default"
        and isinstance(along, int)
        and along % len(context.shape(Ref(op.name))) == dim
    )


def _off_shares(ownership: Ownership, weights: Sequence[float]) -> float:
    """Channels that ranks have more or less than their shares."""
    each = ownership.num_channels / sum(weights)
    counts = zip(ownership.counts, weights, strict=True)
    return sum(abs(count - each * weight) for count, weight in counts)


def _selected_elements(op: Op, out: Ownership, context: RuleContext) -> int:
    """What the layer itself reads of other ranks: a zero pattern was made for one ownership."""
    x, weight = op.args[:2]
    placed = context.sharded(x)
    if placed is None or not isinstance(weight, WeightRef) or not isinstance(x, Ref):
        return 0
    channels = int(context.shape(weight)[1])
    if placed.ownership.num_channels != channels or context.dense_exchange:
        return 0
    selected = context.selected(weight, out, placed.ownership)
    pixels = prod(context.sizes(x.name)) // max(channels, 1)
    return pixels * sum(len(block) for row in selected for block in row)


def _elements(name: str, table: Selected, context: RuleContext) -> int:
    """Of one image, in the channels that a table lists."""
    placed = context.placements[name]
    assert isinstance(placed, Sharded)
    others = (size for dim, size in enumerate(context.sizes(name)) if dim != placed.dim)
    return prod(others) * sum(len(block) for row in table for block in row)


def _split_of(
    before: Sequence[int | str], after: Sequence[int | str], channels: int
) -> tuple[int, ...]:
    """The dimensions that a view makes of one of so many channels; () if it makes none of one."""
    found = view_groups(before, after)
    if found is None:
        return ()
    old, new, groups = found
    for (start, stop), (new_start, new_stop) in groups:
        if list(old[start:stop]) == [channels] and new_stop - new_start > 1:
            return tuple(new[new_start:new_stop])
    return ()


def in_units(factors: Sequence[int], place: int, weights: Sequence[float]) -> Ownership:
    """Channels seen as a product of ``factors``, shared out along one of them in runs, in the
    proportion of the ranks' ``weights``."""
    inner, outer = prod(factors[place + 1 :]), prod(factors[:place])
    return Ownership(
        tuple(
            tuple(
                (before * factors[place] + own) * inner + behind
                for before in range(outer)
                for own in owned
                for behind in range(inner)
            )
            for owned in share_out(factors[place], weights).channels
        )
    )


def dealt_out(channels: int, order: Sequence[int], weights: Sequence[float]) -> Ownership:
    """Channels handed to the ranks one by one, in the proportion of their ``weights``: each goes to
    the rank that is furthest behind its share, of equal ones to the first of ``order``."""
    total = sum(weights)
    owned: list[list[int]] = [[] for _ in weights]
    for channel in range(channels):
        behind = [(channel + 1) * w / total - len(c) for w, c in zip(weights, owned, strict=True)]
        owned[max(order, key=behind.__getitem__)].append(channel)
    return Ownership(tuple(tuple(c) for c in owned))
