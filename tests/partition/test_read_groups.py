"""Selections completed to whole groups of neighbours."""

from __future__ import annotations

import random

import pytest

from disco.partition.read_groups import ChannelsRead, channels_read, in_whole_groups
from disco_kernels import Ownership


def test_by_hand() -> None:
    """Two ranks of 8 and 6 channels, groups of 4: the last has two."""
    inputs = Ownership((tuple(range(8)), tuple(range(8, 14))))
    selected = (((), (9, 13)), ((0, 6, 7), ()))
    read = in_whole_groups(inputs, selected, 4)
    assert read == (((), (8, 9, 10, 11, 12, 13)), ((0, 1, 2, 3, 4, 5, 6, 7), ()))
    counted = channels_read(inputs, selected, read)
    assert counted == ChannelsRead(selected=5, read=14, remote=14)
    assert (counted.density, counted.effective_density) == (5 / 14, 1.0)
    assert in_whole_groups(inputs, selected, 1) == selected


def test_a_group_over_a_border_is_read_whole() -> None:
    inputs = Ownership(((0, 1, 2, 3, 4), (5, 6, 7)))
    assert in_whole_groups(inputs, (((), ()), ((), ())), 4) == (((), (5, 6, 7)), ((4,), ()))


@pytest.mark.parametrize("seed", range(20))
def test_they_are_whole_groups_and_no_more(seed: int) -> None:
    rng = random.Random(seed)
    ranks, channels, size = rng.randint(1, 5), rng.randint(1, 60), rng.choice([2, 4, 8])
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for channel in range(channels):
        owned[rng.randrange(ranks)].append(channel)
    inputs = Ownership(tuple(map(tuple, owned)))
    selected = tuple(
        tuple(tuple(c for c in own if i != j and rng.random() < 0.2) for j, own in enumerate(owned))
        for i in range(ranks)
    )
    read = in_whole_groups(inputs, selected, size)
    for rank in range(ranks):
        wanted = {*owned[rank], *(c for block in selected[rank] for c in block)}
        found = {*owned[rank], *(c for block in read[rank] for c in block)}
        groups = {c // size for c in wanted}
        assert found == {c for c in range(channels) if c // size in groups}
        assert all(set(block) <= set(owned[j]) for j, block in enumerate(read[rank]))
        assert not read[rank][rank]
        assert all(list(block) == sorted(set(block)) for block in read[rank])


def test_nothing_is_a_density_of_one() -> None:
    """A model without a layer that skips zeros reads everything."""
    assert ChannelsRead().effective_density == ChannelsRead().density == 1.0
    assert ChannelsRead(1, 2, 4) + ChannelsRead(1, 1, 4) == ChannelsRead(2, 3, 8)
