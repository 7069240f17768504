"""Convolutions on Hopper's tensor cores, fed by its tensor copy engine (csrc/cuda/conv2d_sm90.cuh).

It computes from the weights that the Triton backend packs, so a layer takes whichever of the two
kernels suits the call. Which one is fixed by the layer and the number of pixels (`choose`), by a
table that was measured on an H100 (`disco_kernels.cuda.tuned`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disco_kernels.cuda import device as devices
from disco_kernels.cuda.tuned import TUNED
from disco_kernels.spec import ConvSpec
from disco_kernels.triton.arguments import VECTOR_BYTES, pixel_strides
from disco_kernels.triton.tables import Lists, num_channels, padded_columns

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (9, 0)  # the kernel's instructions are this architecture's own
_VECTOR = 8  # channels in 16 bytes
_ACTIVATIONS = ("none", "relu", "gelu")  # as the kernel numbers them
_PAIR_BYTES = 4  # of a bias
_NOTHING = (0, 0, 0, 0)
_MOST_APART = 1.25  # the inputs of a layer and of the one whose measurements it takes
_MOST_POSITIONS = 2**30 - 1  # that the kernel's integers count


@lru_cache(maxsize=1)
def _kernel_class() -> Any:
    """The extension's class, or None where it was built without nvcc."""
    try:
        extension = importlib.import_module("disco_kernels._C")
    except ImportError:
        return None
    return getattr(extension, "Conv2dSm90", None)


@lru_cache(maxsize=64)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _CAPABILITY


class Key(NamedTuple):
    """What a layer is to the table."""

    taps: int
    stride: int
    nodes: int
    columns: int  # output channels of the widest node
    inputs: int  # input channels of the node that reads most


class Conv2dSm90:
    """One layer. Make it with `make`; `choose` a tile and ask `takes` before every `run`."""

    def __init__(self, kernel: Any, spec: ConvSpec, lists: Lists) -> None:
        self._kernel = kernel
        self._activation = _ACTIVATIONS.index(spec.activation)
        self._source = lists.sources[0]
        self._border = max(
            d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)
        )
        self._refused: dict[tuple[int, bool, int], bool] = {}
        self.key = Key(
            math.prod(spec.kernel_size),
            spec.stride[0],
            len(lists.outputs),
            max(map(len, lists.outputs)),
            max(map(num_channels, lists.inputs)),
        )

    @classmethod
    def make(cls, lists: Lists, spec: ConvSpec, dtype: torch.dtype) -> Conv2dSm90 | None:
        """None for a layer that the kernel cannot compute, or where there is no kernel."""
        found = _kernel_class()
        if found is None or dtype not in _DTYPES or spec.activation not in _ACTIVATIONS:
            return None
        if len(set(lists.sources)) != 1 or spec.stride[0] != spec.stride[1]:
            return None
        if not lists.out_runs or not all(lists.outputs):
            return None
        taps = math.prod(spec.kernel_size)
        nodes, weight_begin = [], 0
        for parts, outputs in zip(lists.inputs, lists.outputs, strict=True):
            runs = [run for part in parts for run in _runs(part.channels, part.before)]
            inputs, columns = num_channels(parts), padded_columns(len(outputs))
            nodes.append((runs, len(outputs), outputs[0], inputs, weight_begin))
            weight_begin += taps * inputs * columns
        window = (*spec.kernel_size, spec.stride[0], *spec.padding, *spec.dilation)
        if found.why_not(nodes, window):
            return None
        return cls(found(nodes, window, dtype == torch.bfloat16), spec, lists)

    def tiles(self) -> tuple[str, ...]:
        """Rows of pixels x output channels."""
        return tuple(self._kernel.tiles())

    def choose(self, pixels: int) -> int | None:
        """The tile, as a place in `tiles`, for so many output pixels, or None where the Triton
        kernel is faster, or may be: what nothing like it was measured of stays with it."""
        measured = self._measured
        if not measured:
            return None
        nearest = min(measured, key=lambda size: abs(math.log(size / max(1, pixels))))
        name = measured[nearest]
        return None if name is None else self.tiles().index(name)

    @cached_property
    def _measured(self) -> Mapping[int, str | None]:
        """The table's row of this layer, or of the one that differs from it in its inputs alone,
        and least: both kernels' times are nearly proportional to them."""

        def apart(key: tuple[int, ...]) -> float:
            return abs(math.log(key[-1] / self.key.inputs))

        alike = [key for key in TUNED if key[:-1] == self.key[:-1]]
        nearest = min(alike, key=apart, default=None)
        if nearest is None or apart(nearest) > math.log(_MOST_APART):
            return {}
        return TUNED[nearest]

    def takes(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        tensors: Iterable[Tensor | None],
        tile: int = -1,
    ) -> bool:
        """Whether these can be read and written by the tile, or by any; ``tensors`` are outputs and
        residuals."""
        x = sources[self._source]
        if not _is_hopper(x.device) or x.dtype not in _DTYPES or not x.numel():
            return False
        if packed_weight.data_ptr() % VECTOR_BYTES:
            return False
        # A part of a larger bias may begin in the middle of the pairs that are read.
        if bias is not None and bias.data_ptr() % _PAIR_BYTES:
            return False
        used = [x, *(tensor for tensor in tensors if tensor is not None)]
        if max(_positions(tensor, self._border) for tensor in used) > _MOST_POSITIONS:
            return False
        for tensor in used:
            strides = (tensor.stride(0), tensor.stride(2), tensor.stride(3))
            if tensor.stride(1) != 1 or tensor.data_ptr() % VECTOR_BYTES:
                return False
            if any(stride % _VECTOR or stride <= 0 for stride in strides):
                return False
        asked = (x.shape[3], all(map(_is_one_row, used)), tile)
        if asked not in self._refused:
            self._refused[asked] = bool(self._kernel.why_not_width(*asked))
        return not self._refused[asked]

    def run(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        tile: int = -1,
    ) -> None:
        """``tile`` is a place in `tiles`, or -1 for the largest that fits the layer.

        Raises ValueError for a tile that does not fit into shared memory.
        """
        x = sources[self._source]
        with devices.current(x.device):
            self._kernel.run(
                _place(x),
                (x.shape[0], x.shape[2], x.shape[3]),
                packed_weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                _NOTHING if residual is None else _place(residual),
                _place(out),
                self._activation,
                devices.stream_of(x.device),
                tile,
            )


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of images, rows and pixels; those of a single one follow the others."""
    image, row, pixel = pixel_strides(x)
    if x.shape[3] == 1:
        pixel = row if x.shape[2] > 1 else image
    if x.shape[2] == 1:
        row = x.shape[3] * pixel
    if x.shape[0] == 1:
        image = x.shape[2] * row
    return x.data_ptr(), image, row, pixel


def _is_one_row(x: Tensor) -> bool:
    """Whether the pixels of all images lie at one distance from each other."""
    _, image, row, pixel = _place(x)
    return row == x.shape[3] * pixel and image == x.shape[2] * row


def _positions(x: Tensor, border: int) -> int:
    """At least as many as the kernel counts, which are pixels with a border around each image."""
    return x.shape[0] * (x.shape[2] + 2 * border) * (x.shape[3] + 2 * border)


def _runs(channels: Sequence[int], before: int) -> list[tuple[int, int, int]]:
    """Runs of neighbours: first channel, how many, and how many of the node's come before."""
    runs: list[tuple[int, int, int]] = []
    begin = 0
    for end in range(1, len(channels) + 1):
        if end == len(channels) or channels[end] != channels[end - 1] + 1:
            runs.append((channels[begin], end - begin, before + begin))
            begin = end
    return runs
