"""The static gather: ranks hold channels in an order in which those that they send are runs.

A layer's outputs may be computed in any order; weights, bias and norms follow, and nothing changes
but the addresses. With two ranks and a tensor that nothing else is tied to, what is sent is one
run. Several receivers' selections overlap, and so do those of tensors that are tied: channels
with the same receivers then lie together, and groups of them beside their likes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise

from disco.partition.exchanges import bytes_per_channel
from disco.partition.provenance import Provenance
from disco.partition.rank_builder import Exchange
from disco.partition.rules import Lowering, RuleContext
from disco.program import Program
from disco_kernels.pattern import Ownership

# Classes of channels (those with the same receivers everywhere) up to which each next one is looked
# for among all that are left: 256 take 10 ms.
_SEARCHED = 256


def ordered_layers(
    program: Program,
    lowerings: Sequence[Lowering],
    context: RuleContext,
    exchanges: Mapping[str, Exchange],
    kept_order: Collection[str] = (),
) -> dict[str, Ownership]:
    """By the layers' values, the same ownership in the better order, where there is one."""
    provenance = Provenance(program, lowerings, context, kept_order)
    groups = provenance.free_layers()
    receivers = _receivers(provenance, context, exchanges)
    owned = {
        op.name: low.out_ownership
        for op, low in zip(program.ops, lowerings, strict=True)
        if low.out_ownership is not None
    }
    found: dict[str, Ownership] = {}
    for leader, layers in groups.items():
        ownership, masks = owned[layers[0]], receivers.get(leader)
        if masks is None or any(owned[layer] != ownership for layer in layers):
            continue
        ordered = Ownership(tuple(_ordered(own, masks) for own in ownership.channels))
        if ordered != ownership:
            found.update(dict.fromkeys(layers, ordered))
    return found


def _receivers(
    provenance: Provenance, context: RuleContext, exchanges: Mapping[str, Exchange]
) -> dict[str, dict[int, int]]:
    """By group of layers and channel: a bit for every exchange and rank that it is sent to, the
    highest for the exchange with most bytes a channel."""
    partial = [e for e in exchanges.values() if e.form == "inputs" and not e.gathered_by]
    partial.sort(key=lambda e: (bytes_per_channel(e.value, context), -e.number))
    masks: dict[str, dict[int, int]] = {}
    bit = 1
    for exchange in partial:
        origin = provenance.of(exchange.value)
        for row in exchange.sent:
            for channel in (c for block in row for c in block):
                at = origin[channel] if origin else None
                if at is not None:
                    group = masks.setdefault(at[0], {})
                    group[at[1]] = group.get(at[1], 0) | bit
            bit <<= 1
    return masks


def _ordered(owned: Sequence[int], masks: Mapping[int, int]) -> tuple[int, ...]:
    """A rank's channels in the order with the fewest runs; of equals as they are."""
    orders = orders_to_try(owned, masks)
    return min(orders, key=lambda order: _num_runs([masks.get(c, 0) for c in order]))


def orders_to_try(owned: Sequence[int], masks: Mapping[int, int]) -> list[tuple[int, ...]]:
    """As they are, and orders in which channels with the same mask lie together.

    Args:
        owned: channels whose places can be exchanged.
        masks: per channel a bit for everyone it is sent to; the highest counts most.
    """
    given = tuple(owned)
    classes: dict[int, list[int]] = {}
    for channel in given:
        classes.setdefault(masks.get(channel, 0), []).append(channel)
    ways: list[Callable[[Collection[int]], list[int]]] = [_by_value, _by_gray_code]
    if len(classes) <= _SEARCHED:
        ways.append(_by_neighbour)
    return [given, *(tuple(c for m in way(classes) for c in classes[m]) for way in ways)]


def _num_runs(masks: Sequence[int]) -> int:
    """Runs of channels, over all receivers."""
    return sum(_bits(after & ~before) for before, after in pairwise((0, *masks)))


def _by_value(masks: Collection[int]) -> list[int]:
    return sorted(masks, reverse=True)


def _by_gray_code(masks: Collection[int]) -> list[int]:
    """Neighbours in a Gray code differ in one bit."""

    def place(mask: int) -> int:
        number = 0
        while mask:
            number ^= mask
            mask >>= 1
        return number

    return sorted(masks, key=place, reverse=True)


def _by_neighbour(masks: Collection[int]) -> list[int]:
    """Each next class the one that differs least from the last; first the one sent nowhere."""
    left = sorted(masks)
    order = left[:1]
    del left[:1]
    while left:
        last = order[-1]
        following = min(left, key=lambda mask: (_bits(mask ^ last), -mask))
        left.remove(following)
        order.append(following)
    return order


def _bits(mask: int) -> int:
    return mask.bit_count()
