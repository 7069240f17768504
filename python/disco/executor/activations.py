"""Memory of the values that kernels compute: planned once, kept from one request to the next.

A value's buffer is used again as soon as nothing reads it any more, most recently used first, so
that it is still in the cache. A convolution writes onto the residual that it adds where that is
read for the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from disco_kernels.memory import large_pages
from disco_kernels.two_passes import Passes

_LINE_BYTES = 64


# A value's shape, strides and dtype. The strides are those that its kernel chose, without gaps: a
# map is channels-last, tokens `[B, H, W, C]` are contiguous, and the shape does not tell which.
Placed = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
# What a request of the same input shapes computed before, by slot.
Layout = Mapping[int, Placed]


class Activations:
    """The buffers of one request, for one set of input shapes.

    The first request of a set of shapes computes into fresh tensors and leaves their shapes here;
    from the second on they are written to the same memory every time.

    Attributes:
        layout: as given, None for a first request.
        out: by slot, where a kernel writes; what is not there it allocates.
        views: by slot, views of what is in `out`, and received payloads: the same in every request.
        bound: by slot, kernels whose operands are all in these, ready to be repeated.
        passes: by slot, likewise kernels that can also be run in two passes.
    """

    def __init__(self, layout: Layout | None, buffer_of: Mapping[int, int]) -> None:
        self.layout = layout
        self.out: dict[int, Tensor] = {}
        self.views: dict[int, Tensor] = {}
        self.bound: dict[int, Callable[[], None]] = {}
        self.passes: dict[int, Passes] = {}
        if layout is None:
            return
        sizes: dict[int, int] = {}
        for slot, number in buffer_of.items():
            sizes[number] = max(sizes.get(number, 0), _num_bytes(layout[slot]))
        begin: dict[int, int] = {}
        total = 0
        for number, num_bytes in sorted(sizes.items()):
            begin[number] = total
            total += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        if total == 0:
            return
        device = layout[next(iter(buffer_of))][3]  # one program, one device
        on_cpu = device.type == "cpu"
        memory = large_pages(total) if on_cpu else _device_memory(total, device)
        for slot, number in buffer_of.items():
            shape, strides, dtype, _ = layout[slot]
            piece = memory[begin[number] : begin[number] + _num_bytes(layout[slot])]
            self.out[slot] = piece.view(dtype).as_strided(shape, strides)

    def holds(self, slots: Sequence[int], *, tokens: bool) -> bool:
        """Whether the values of all these slots are at the same place in every request, and a
        kernel reads them without a copy: as maps, or as contiguous tokens."""
        in_place = Tensor.is_contiguous if tokens else _is_map
        fixed = (self.fixed(slot) for slot in slots)
        return all(value is not None and in_place(value) for value in fixed)

    def keep_view(self, slot: int, view: Tensor) -> None:
        """A value that will be at this place in every request of these input shapes."""
        if self.out:
            self.views[slot] = view

    def fixed(self, slot: int) -> Tensor | None:
        """A value that is at the same place in every request."""
        found = self.out.get(slot)
        return self.views.get(slot) if found is None else found


def _device_memory(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _num_bytes(placed: Placed) -> int:
    shape, _, dtype, _ = placed
    return shape.numel() * dtype.itemsize


def _is_map(x: Tensor) -> bool:
    return x.dim() == 4 and (x.stride(1) == 1 or x.shape[1] <= 1)
