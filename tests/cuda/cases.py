"""Maps, lists of channels, and messages that the CUDA kernels are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.registry import PreparedGatherPack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIRES = (*DTYPES, torch.int8)
CHANNELS = 24
# Single channels, groups of 16 bytes and of 8, none, repeated ones, the same for two.
LISTS: tuple[list[list[int]], ...] = (
    [[3, 1, 17], list(range(CHANNELS))],
    [[]],
    [[5] * 7, [], [23, 0]],
    [list(range(8, 24))],
    [list(range(24)), [16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7]],
    [[4, 5, 6, 7, 20, 21, 22, 23]],
    [list(range(1, 9))],  # neighbours, but from no multiple of 8 on
)
_UNTOUCHED = 0x55


def maps(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """``[2, 24, 5, 7]`` that lie in memory in every way that a kernel tells apart."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)

    yield "whole", normal(2, 24, 5, 7)
    yield "channels of a wider one", normal(2, 32, 5, 7)[:, 8:]
    yield "odd strides", normal(2, 27, 5, 7)[:, 1:25]
    yield "rows of higher ones", normal(2, 24, 9, 7)[:, :, 1:6]
    yield "part of every row", normal(2, 24, 9, 8)[:, :, 1:6, :7]
    yield "every second pixel", normal(2, 24, 10, 14)[:, :, ::2, ::2]
    yield "one image for all", normal(1, 24, 5, 7).expand(2, -1, -1, -1)


def hostile(dtype: torch.dtype) -> Tensor:
    """``[2, 24, 5, 7]`` with NaN, infinities, channels of nothing but small or zero values, the
    largest and the smallest that there are, and halves between two steps."""
    x = torch.randn(2, CHANNELS, 5, 7)
    x[0, 0, 1, 1], x[1, 1, 0, 0], x[0, 2, 4, 6] = float("nan"), float("inf"), -float("inf")
    x[:, 3], x[:, 4], x[:, 5] = 1e-35, 0.0, -0.0
    x[0, 6], x[1, 7, 2, 2] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[:, 8] = torch.finfo(dtype).tiny
    x[:, 9] = 2.0**-100
    x[:, 9, 0, 0] = 2.0**-100 * (1 - 2.0**-8)
    x[:, 10] = torch.arange(35).view(5, 7) + 0.5
    x[:, 10, 0, 0] = 127.0
    return x.to(dtype).to(memory_format=torch.channels_last)


def check_messages(
    prepared: PreparedGatherPack,
    pack: dk.GatherPack,
    x: Tensor,
    x_on_device: Tensor,
    label: object,
    offset_bytes: int = 0,
) -> int:
    """Packs ``x`` and compares with the reference; returns how many messages that were.

    Messages lie between bytes that must not change, ``offset_bytes`` away from a multiple of 16.
    NaN is NaN, whatever its bits.
    """
    wanted = pack(x)
    rooms, messages = [], []
    for message in wanted:
        room = torch.full((message.nbytes + 64,), _UNTOUCHED, dtype=torch.uint8)
        room = room.to(x_on_device.device)
        begin = 16 + offset_bytes
        rooms.append(room)
        messages.append(
            room[begin : begin + message.nbytes].view(message.dtype).view(message.shape)
        )
    prepared.run(x_on_device, messages)
    for room, message, reference in zip(rooms, messages, wanted, strict=True):
        assert same(message.cpu(), reference), (label, message, reference)
        edges = torch.cat([room[: 16 + offset_bytes], room[16 + offset_bytes + message.nbytes :]])
        assert bool((edges == _UNTOUCHED).all()), (label, "written beside the message")
    return len(messages)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether all bits are, but for those of a NaN in a floating message."""
    if found.dtype != torch.int8:
        bits = {2: torch.int16, 4: torch.int32}[found.itemsize]
        equal = found.view(bits) == wanted.view(bits)
        return bool((equal | (found.isnan() & wanted.isnan())).all())
    return torch.equal(found, wanted)
