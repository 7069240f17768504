"""Lists of channels as the kernels read them: in groups that one load takes, cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from disco_kernels.cuda.arguments import MAX_PART_CHANNELS

GROUPS = (8, 4, 1)  # channels that the kernels take at a time


@dataclass(frozen=True)
class ListPart:
    """Some neighbours of a list: ``count`` channels of message ``message`` from ``first`` on."""

    message: int
    first: int
    count: int
    begin: int  # in the lists put together


class ChannelLists:
    """The channels of every message, and their tables on the devices where they were used.

    Args:
        index: per message int32 channels.
    """

    def __init__(self, index: Sequence[Tensor]) -> None:
        self.lists = [[int(c) for c in one.tolist()] for one in index]
        self.counts = [len(one) for one in self.lists]
        self.together = [channel for one in self.lists for channel in one]
        self.largest = max(self.together, default=-1)
        self._tables: dict[tuple[str, int, torch.device], Tensor] = {}

    @cached_property
    def group(self) -> int:
        """The most channels, out of `GROUPS`, that are neighbours from a multiple on everywhere."""
        return next(size for size in GROUPS if all(_grouped(one, size) for one in self.lists))

    @cached_property
    def parts(self) -> list[ListPart]:
        """Lists in pieces of at most MAX_PART_CHANNELS, without empty ones."""
        found = []
        begin = 0
        for message, count in enumerate(self.counts):
            for first in range(0, count, MAX_PART_CHANNELS):
                cut = min(MAX_PART_CHANNELS, count - first)
                found.append(ListPart(message, first, cut, begin + first))
            begin += count
        return found

    @cached_property
    def unique(self) -> list[int]:
        """Every listed channel once, in order."""
        return sorted(set(self.together))

    def groups_on(self, device: torch.device, size: int) -> Tensor:
        """The first channel of every group of ``size``, int32."""
        return self._table("groups", self.together[::size], size, device)

    def unique_groups_on(self, device: torch.device, size: int) -> Tensor:
        """As `groups_on`, of `unique`."""
        return self._table("unique", self.unique[::size], size, device)

    def slots_on(self, device: torch.device) -> Tensor:
        """The place of every channel in `unique`, int32."""
        place = {channel: slot for slot, channel in enumerate(self.unique)}
        return self._table("slots", [place[channel] for channel in self.together], 1, device)

    def _table(self, name: str, values: list[int], size: int, device: torch.device) -> Tensor:
        key = (name, size, device)
        found = self._tables.get(key)
        if found is None:
            made = torch.tensor(values, dtype=torch.int32).to(device)
            found = self._tables.setdefault(key, made)
        return found


def _grouped(channels: list[int], size: int) -> bool:
    return len(channels) % size == 0 and all(
        channel == channels[i // size * size] + i % size and (channel - i) % size == 0
        for i, channel in enumerate(channels)
    )
