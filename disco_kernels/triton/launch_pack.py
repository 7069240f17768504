"""The launches that pack an exchange's messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disco_kernels.registry import PreparedGatherPack
from disco_kernels.triton.arguments import VECTOR_BYTES, power_of_two, strides, wide
from disco_kernels.triton.message import pack_kernel, quantise_kernel, scale_kernel
from disco_kernels.triton.tables import Lists, Part
from disco_kernels.wire import LARGEST_SCALE, SMALLEST_MAGNITUDE, message_views


class TritonGatherPack(PreparedGatherPack):
    """All messages of an exchange; int8 takes two launches a message, others one for all."""

    def __init__(self, index: Sequence[Tensor]) -> None:
        self.index = [index_d.to(torch.int32).cpu() for index_d in index]
        lists = [tuple(int(c) for c in one.tolist()) for one in self.index]
        self.counts = tuple(map(len, lists))
        self.begins = tuple(sum(self.counts[:d]) for d in range(len(lists)))
        self.lists = Lists((0,), (False,), tuple((Part(listed, 0),) for listed in lists), ())
        self._channels: dict[torch.device, Tensor] = {}

    def run(self, x: Tensor, messages: Sequence[Tensor]) -> None:
        largest = self.lists.largest_channel.get(0, -1)
        if largest >= x.shape[1]:
            raise ValueError(f"channel {largest} is listed, but only 0 to {x.shape[1] - 1} exist")
        if len(messages) != len(self.counts):
            raise ValueError(f"{len(self.counts)} messages are needed, given {len(messages)}")
        batch, _, height, width = x.shape
        if not messages or x.numel() == 0:
            return
        channels = self._channels_on(x.device)
        if messages[0].dtype == torch.int8:
            for count, begin, message in zip(self.counts, self.begins, messages, strict=True):
                _pack_int8(x, channels[begin : begin + count], message)
            return
        pixels = batch * height * width
        taken = [d for d, count in enumerate(self.counts) if count]
        if not taken:
            return
        widest = max(self.counts)
        block_c = min(128, max(16, power_of_two(widest)))
        block_m = max(16, 4096 // block_c)
        pack_kernel[(-(-pixels // block_m),)](
            x,
            strides(x),
            tuple(messages[d] for d in taken),
            tuple(self.counts[d] for d in taken),
            tuple(self.begins[d] for d in taken),
            channels,
            pixels,
            height,
            width,
            NUM_MESSAGES=len(taken),
            GROUP=self._group(x, messages),
            WIDE=wide(x, *messages),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=4,
        )

    def _group(self, x: Tensor, messages: Sequence[Tensor]) -> int:
        vector = VECTOR_BYTES // x.element_size()
        strides = (x.stride(0), x.stride(2), x.stride(3))
        aligned = all(t.data_ptr() % VECTOR_BYTES == 0 for t in (x, *messages) if t.numel())
        if not aligned or x.stride(1) != 1 or any(stride % vector for stride in strides):
            return 1
        return self.lists.group(vector)

    def _channels_on(self, device: torch.device) -> Tensor:
        found = self._channels.get(device)
        if found is None:
            listed = torch.cat(self.index) if self.index else torch.empty(0, dtype=torch.int32)
            self._channels[device] = found = listed.to(device)
        return found


def _pack_int8(x: Tensor, channels: Tensor, message: Tensor) -> None:
    batch, _, height, width = x.shape
    count, pixels = channels.numel(), height * width
    values, scale = message_views(message, (batch, height, width), count)
    assert scale is not None
    filled = 4 * scale.numel() + values.numel()
    if filled < message.numel():
        message.view(-1)[filled:].zero_()
    if count == 0:
        return
    largest = torch.empty_like(scale)
    block_c = min(64, max(16, power_of_two(count)))
    block_p = 2048 // block_c
    scale_kernel[(batch, -(-count // block_c))](
        x,
        strides(x),
        scale,
        largest,
        channels,
        count,
        pixels,
        width,
        SMALLEST=SMALLEST_MAGNITUDE,
        LARGEST_SCALE=LARGEST_SCALE,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
    )
    quantise_kernel[(batch, -(-pixels // block_p))](
        x,
        strides(x),
        largest,
        values,
        channels,
        count,
        pixels,
        width,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        # Fused, product and rounding would take another side of ties than the other backends.
        enable_fp_fusion=False,
    )
