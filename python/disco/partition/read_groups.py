"""Channels read in whole groups of neighbours: what vectors of a GPU load at once.

A layer that skips zeros may read a few channels more than it has weights for; they are multiplied
by zero. Where all that it reads are whole groups that begin at multiples of their size, a load
takes a group, not a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from disco_kernels.pattern import Ownership, Selected


@dataclass(frozen=True)
class ChannelsRead:
    """Of layers that skip zeros, over all nodes' blocks.

    Attributes:
        selected: input channels of other nodes that have weights.
        read: those that are read, zeros included.
        remote: those that there are.
    """

    selected: int = 0
    read: int = 0
    remote: int = 0

    @property
    def density(self) -> float:
        """Of the weights' pattern."""
        return self.selected / self.remote if self.remote else 1.0

    @property
    def effective_density(self) -> float:
        """That is computed with."""
        return self.read / self.remote if self.remote else 1.0

    def __add__(self, other: ChannelsRead) -> ChannelsRead:
        return ChannelsRead(
            self.selected + other.selected, self.read + other.read, self.remote + other.remote
        )


def in_whole_groups(inputs: Ownership, selected: Selected, group_size: int) -> Selected:
    """``selected[receiver][sender]``, with what completes the groups that a receiver reads of.

    Args:
        inputs: who owns the input channels; a receiver reads its own besides.
        group_size: neighbours in a group, 1 or more. The last group of all channels may be smaller.
    """
    if group_size == 1:
        return selected
    owner = {channel: rank for rank, owned in enumerate(inputs.channels) for channel in owned}
    found = []
    for receiver, row in enumerate(selected):
        own = inputs.channels[receiver]
        groups = {c // group_size for channels in (own, *row) for c in channels}
        completed: list[list[int]] = [[] for _ in row]
        for channel in range(inputs.num_channels):
            if owner[channel] != receiver and channel // group_size in groups:
                completed[owner[channel]].append(channel)
        found.append(tuple(map(tuple, completed)))
    return tuple(found)


def channels_read(inputs: Ownership, selected: Selected, read: Selected) -> ChannelsRead:
    """Counts of one layer: of what has weights, of what is read."""
    ranks = range(inputs.world_size)
    return ChannelsRead(
        sum(len(channels) for row in selected for channels in row),
        sum(len(channels) for row in read for channels in row),
        sum(inputs.num_channels - len(inputs.channels[rank]) for rank in ranks),
    )
