"""The launches that pack an exchange's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure
from dataclasses import dataclass

import torch
from torch import Tensor

from disco_kernels.cuda import device as devices
from disco_kernels.cuda.arguments import (
    MAX_PARTS,
    NAMES,
    MagnitudeArgs,
    PackArgs,
    Part,
    QuantiseArgs,
    formats,
    magic_of,
    map_of,
    stride_multiple,
)
from disco_kernels.cuda.launcher import Launcher, get_launcher
from disco_kernels.cuda.lists import GROUPS, ChannelLists, ListPart
from disco_kernels.cuda.tiles import magnitude_blocks, quantised_tile_pixels, tile_pixels
from disco_kernels.registry import PreparedGatherPack

_PIECE_BYTES = 4  # that a store has at least
_VECTOR_BYTES = 16  # and at most


@dataclass
class Launch:
    """A kernel with its arguments, ready to go."""

    kernel: str
    blocks: int
    args: Structure


class CudaGatherPack(PreparedGatherPack):
    """All messages of an exchange in one launch; int8 in two. (One for every MAX_PARTS messages.)

    Nothing is allocated that torch's allocator does not know, and nothing waits, once the tables
    are on the device: calls can be captured into a CUDA graph after a first one.
    """

    def __init__(self, index: Sequence[Tensor], launcher: Launcher | None = None) -> None:
        self.lists = ChannelLists(index)
        self._launcher = launcher

    def run(self, x: Tensor, messages: Sequence[Tensor]) -> None:
        with devices.current(x.device):
            scratch, launches = self._launches(x, messages)
            self._start(launches, x.device)
        del scratch  # the stream's order keeps it until then

    def bind(self, x: Tensor, messages: Sequence[Tensor]) -> Callable[[], None]:
        with devices.current(x.device):
            kept = (self._launches(x, messages), x, tuple(messages))

        def run() -> None:
            with devices.current(x.device):
                self._start(kept[0][1], x.device)

        run()
        return run

    def _start(self, launches: Sequence[Launch], device: torch.device) -> None:
        if not launches:
            return
        launcher, stream = self._launcher or get_launcher(), devices.stream_of(device)
        for one in launches:
            launcher.launch(one.kernel, one.blocks, one.args, device, stream)

    def _launches(
        self, x: Tensor, messages: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Launch]]:
        """What to launch, and memory to keep until that is done."""
        lists = self.lists
        if lists.largest >= x.shape[1]:
            raise ValueError(
                f"channel {lists.largest} is listed, but only 0 to {x.shape[1] - 1} exist"
            )
        if len(messages) != len(lists.counts):
            raise ValueError(f"{len(lists.counts)} messages are needed, given {len(messages)}")
        if not lists.parts:
            return None, []
        quantised = messages[0].dtype == torch.int8
        if x.numel() == 0:
            if quantised:
                for message in messages:
                    message.zero_()  # the scales of images without pixels
            return None, []
        if quantised:
            return self._quantise(x, messages)
        return None, self._pack(x, messages)

    def _pack(self, x: Tensor, messages: Sequence[Tensor]) -> list[Launch]:
        wire = messages[0].dtype
        group = self._group(x, messages, _VECTOR_BYTES // max(x.itemsize, wire.itemsize))
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        table = self.lists.groups_on(x.device, group)
        launches = []
        for parts in self._batches():
            tile = self._tile(x, parts, group, wire)
            args = PackArgs(
                map_of(x),
                table.data_ptr(),
                pixels,
                tile,
                len(parts),
                self._parts(parts, messages, group),
            )
            kernel = f"disco_pack_{formats(x.dtype, wire)}_{group}"
            launches.append(Launch(kernel, -(-pixels // tile) * len(parts), args))
        return launches

    def _quantise(self, x: Tensor, messages: Sequence[Tensor]) -> tuple[Tensor, list[Launch]]:
        lists, device = self.lists, x.device
        images, pixels = x.shape[0], x.shape[2] * x.shape[3]
        group = self._group(x, messages, _VECTOR_BYTES // x.itemsize)
        unique, groups = len(lists.unique), len(lists.unique) // group
        processors = devices.multiprocessors(device)
        chunk, chunks, split = magnitude_blocks(pixels, images, groups, processors)
        splits = -(-pixels // split)
        magnitudes = torch.empty(images * splits * unique, dtype=torch.float32, device=device)
        args = MagnitudeArgs(
            map_of(x),
            lists.unique_groups_on(device, group).data_ptr(),
            magnitudes.data_ptr(),
            groups,
            chunk,
            chunks,
            splits,
            split,
            magic_of(chunk),
        )
        name = f"{NAMES[x.dtype]}_{group}"
        launches = [Launch(f"disco_magnitudes_{name}", images * chunks * splits, args)]
        for parts in self._batches():
            tile = self._tile(x, parts, group, torch.int8)
            if not self._cut(parts):
                most = max(part.count for part in parts) // group
                tile = quantised_tile_pixels(pixels, images, most, tile, len(parts), processors)
            tiles = -(-pixels // tile)
            quantise = QuantiseArgs(
                map_of(x),
                lists.groups_on(device, group).data_ptr(),
                lists.slots_on(device).data_ptr(),
                magnitudes.data_ptr(),
                unique,
                splits,
                images,
                tiles,
                tile,
                len(parts),
                self._parts(parts, messages, group),
            )
            blocks = images * tiles * len(parts)
            launches.append(Launch(f"disco_quantise_{name}", blocks, quantise))
        return magnitudes, launches

    def _batches(self) -> list[list[ListPart]]:
        parts = self.lists.parts
        return [parts[i : i + MAX_PARTS] for i in range(0, len(parts), MAX_PARTS)]

    def _cut(self, parts: list[ListPart]) -> bool:
        """Whether a list is cut: then only one pixel's values of it follow each other."""
        return any(part.count < self.lists.counts[part.message] for part in parts)

    def _tile(self, x: Tensor, parts: list[ListPart], group: int, wire: torch.dtype) -> int:
        if self._cut(parts):
            return 1
        groups = max(1, sum(part.count for part in parts) // group // len(parts))
        in_piece = max(1, _PIECE_BYTES // (group * wire.itemsize))
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return tile_pixels(pixels, groups, in_piece, len(parts), devices.multiprocessors(x.device))

    def _group(self, x: Tensor, messages: Sequence[Tensor], most: int) -> int:
        """Channels a load: all lists, strides and addresses have to be multiples of it."""
        return next(
            size
            for size in GROUPS
            if size <= min(most, self.lists.group)
            and (size == 1 or (stride_multiple(x, size) and _aligned(messages, size)))
        )

    def _parts(self, parts: Sequence[ListPart], messages: Sequence[Tensor], group: int) -> object:
        made = (Part * MAX_PARTS)()
        for i, part in enumerate(parts):
            groups = part.count // group
            made[i] = Part(
                messages[part.message].data_ptr(),
                self.lists.counts[part.message],
                part.first,
                groups,
                magic_of(groups),
                part.begin // group,
                part.begin,
            )
        return made


def _aligned(messages: Sequence[Tensor], values: int) -> bool:
    # An int8 message's values follow scales: 4 bytes for each of a multiple of `values` channels.
    return all(m.data_ptr() % (values * m.itemsize) == 0 for m in messages if m.numel())
