"""What the kernels read about a layer: its nodes, their channels and tiles, as int32 tables.

| table | content |
| --- | --- |
| nodes | per node: begin of its weights, columns (output channels), columns with padding, |
| | begin of its outputs, input channels; then per part: first channel of a run or begin of a |
| | list, channels, channels of the parts before |
| channels | lists of input channels, in groups of neighbours of which only the first is named; |
| | -1 fills a list up to whole chunks |
| out_channels | output channels of all nodes, one after the other |
| tiles | per tile: node, first column |

A part is what the sum takes from one source in a row: a run of neighbours, or a list. Weights are
``[tap][input][column]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from disco_kernels.spec import Conv2dDescriptor, Node

WEIGHT_VECTOR = 8  # columns are padded to whole vectors of so many, 16 bytes in 16-bit dtypes
_FIXED_WORDS = 5
_PART_WORDS = 3

# Shorter runs are read by their list.
SHORTEST_RUN = 32

Channels = tuple[int, ...]


class Part(NamedTuple):
    """Channels of one source, and how many of the node's channels come before them."""

    channels: Channels
    before: int


def num_channels(parts: Iterable[Part]) -> int:
    """Input channels of a node."""
    return sum(len(part.channels) for part in parts)


def padded_columns(out_channels: int) -> int:
    """Columns of a node's packed weight."""
    return -(-out_channels // WEIGHT_VECTOR) * WEIGHT_VECTOR


@dataclass(frozen=True)
class Lists:
    """A descriptor's lists, spelt out once.

    Attributes:
        sources: source of every part.
        runs: whether every node's channels of the part are neighbours.
        inputs: per node its parts, which may be summed in any order.
        outputs: per node its output channels.
    """

    sources: tuple[int, ...]
    runs: tuple[bool, ...]
    inputs: tuple[tuple[Part, ...], ...]
    outputs: tuple[Channels, ...]

    @classmethod
    def of(cls, descriptor: Conv2dDescriptor) -> Lists:
        per_node = [_by_source(node) for node in descriptor.nodes]
        sources = max((tuple(s for s, _ in parts) for parts in per_node), key=len, default=())
        columns: list[tuple[int, bool, list[Part]]] = []
        for place, source in enumerate(sources):
            pieces = [_around_longest_run(_at(parts, place, sources)) for parts in per_node]
            for piece, is_run in enumerate((True, False, False)):
                column = [node[piece] for node in pieces]
                if any(part.channels for part in column):
                    columns.append((source, is_run, column))
        return cls(
            sources=tuple(source for source, _, _ in columns),
            runs=tuple(is_run for _, is_run, _ in columns),
            inputs=tuple(
                tuple(column[n] for _, _, column in columns) for n in range(len(per_node))
            ),
            outputs=tuple(tuple(node.out_channels.to_list()) for node in descriptor.nodes),
        )

    @property
    def longest_list(self) -> int:
        """Channels of the longest part that is no run."""
        lists = [
            len(part.channels)
            for parts in self.inputs
            for part, is_run in zip(parts, self.runs, strict=True)
            if not is_run
        ]
        return max(lists, default=0)

    def group(self, vector: int) -> int:
        """``vector`` if every list is made of runs of so many that begin at a multiple of it."""
        fits = all(_in_groups(part.channels, vector) for parts in self.inputs for part in parts)
        return vector if fits else 1

    @property
    def out_runs(self) -> bool:
        """Whether every node's outputs are neighbours."""
        return all(list(o) == list(range(o[0], o[0] + len(o))) for o in self.outputs if o)

    def out_group(self, vector: int) -> int:
        """``vector`` if every node writes whole vectors of neighbours, else 1."""
        fits = self.out_runs and all(
            o[0] % vector == 0 and len(o) % vector == 0 for o in self.outputs if o
        )
        return vector if fits else 1

    @property
    def largest_channel(self) -> dict[int, int]:
        """Per source the largest channel that is listed."""
        largest: dict[int, int] = {}
        for parts in self.inputs:
            for source, part in zip(self.sources, parts, strict=True):
                if part.channels:
                    largest[source] = max(largest.get(source, -1), *part.channels)
        return largest


@dataclass(frozen=True)
class Tables:
    """The tables on a device; see the top of this file."""

    nodes: Tensor
    channels: Tensor
    out_channels: Tensor
    tiles: Tensor
    node_words: int
    num_tiles: int
    # The first node's record and the difference to the next, where all nodes differ by the same
    # and have as many tiles; else None.
    record_base: tuple[int, ...] | None
    record_step: tuple[int, ...] | None
    tiles_per_node: int


def make_tables(
    lists: Lists, taps: int, group: int, block_n: int, block_g: int, device: torch.device
) -> Tables:
    """The tables of a launch with this group and these tiles."""
    nodes: list[int] = []
    channels: list[int] = []
    out_channels: list[int] = []
    tiles: list[tuple[int, int]] = []
    out_runs, weight_begin = lists.out_runs, 0
    for number, (parts, outputs) in enumerate(zip(lists.inputs, lists.outputs, strict=True)):
        num_inputs, columns = num_channels(parts), padded_columns(len(outputs))
        out_begin = (outputs[0] if outputs else 0) if out_runs else len(out_channels)
        nodes += [weight_begin, len(outputs), columns, out_begin, num_inputs]
        for (listed, before), is_run in zip(parts, lists.runs, strict=True):
            first = (listed[0] if listed else 0) if is_run else len(channels)
            nodes += [first, len(listed), before]
            if not is_run:
                channels += [*listed[::group], *[-1] * ((-len(listed) % block_g) // group)]
        weight_begin += taps * num_inputs * columns
        out_channels += outputs
        tiles += [(number, first) for first in range(0, len(outputs), block_n)]
    node_words = _FIXED_WORDS + _PART_WORDS * len(lists.sources)
    records = [tuple(nodes[i : i + node_words]) for i in range(0, len(nodes), node_words)]
    counts = {-(-len(outputs) // block_n) for outputs in lists.outputs}
    step = _even_step(records) if len(counts) == 1 else None
    return Tables(
        nodes=_table(nodes, device),
        channels=_table(channels, device),
        out_channels=_table(out_channels, device),
        tiles=_table([word for tile in tiles for word in tile], device),
        node_words=node_words,
        num_tiles=len(tiles),
        record_base=None if step is None else records[0],
        record_step=step,
        tiles_per_node=max(1, min(counts)),
    )


def _even_step(records: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """What is added from each record to the next, if that is the same everywhere."""
    steps = {
        tuple(b - a for a, b in zip(first, second, strict=True))
        for first, second in pairwise(records)
    }
    if len(steps) > 1:
        return None
    return steps.pop() if steps else (0,) * len(records[0])


def _by_source(node: Node) -> list[tuple[int, Part]]:
    """Segments of one source in a row, put together."""
    parts: list[tuple[int, Part]] = []
    before = 0
    for segment in node.segments:
        listed = tuple(segment.channels.to_list())
        if parts and parts[-1][0] == segment.source:
            part = parts[-1][1]
            parts[-1] = (segment.source, Part(part.channels + listed, part.before))
        else:
            parts.append((segment.source, Part(listed, before)))
        before += len(listed)
    return parts


def _at(parts: Sequence[tuple[int, Part]], place: int, sources: Sequence[int]) -> Part:
    """What a node reads of the source at this place; nodes may end before others do."""
    if tuple(source for source, _ in parts) != tuple(sources[: len(parts)]):
        raise ValueError(
            f"the nodes read their sources in orders that do not fit each other: "
            f"{[source for source, _ in parts]} and {list(sources)}"
        )
    return parts[place][1] if place < len(parts) else Part((), 0)


def _around_longest_run(part: Part) -> tuple[Part, Part, Part]:
    """The longest run of neighbours and up to two lists around it, the second mostly empty."""
    channels, offset = part
    best, begin = (0, 0), 0
    for end in range(1, len(channels) + 1):
        if end == len(channels) or channels[end] != channels[end - 1] + 1:
            if end - begin > best[1] - best[0]:
                best = (begin, end)
            begin = end
    if best[1] - best[0] < SHORTEST_RUN:
        best = (0, 0)
    run = Part(channels[best[0] : best[1]], offset + best[0])
    around = [Part(channels[: best[0]], offset), Part(channels[best[1] :], offset + best[1])]
    around.sort(key=lambda piece: not piece.channels)  # nothing comes last
    return run, around[0], around[1]


def _in_groups(channels: Sequence[int], size: int) -> bool:
    if len(channels) % size:
        return False
    groups = (channels[i : i + size] for i in range(0, len(channels), size))
    return all(
        group[0] % size == 0 and list(group) == list(range(group[0], group[0] + size))
        for group in groups
    )


def _table(values: Sequence[int], device: torch.device) -> Tensor:
    # Never empty: a kernel needs an address.
    return torch.tensor(list(values) or [0], dtype=torch.int32, device="cpu").to(device)
