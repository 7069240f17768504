"""Convolutions on Hopper's tensor cores, fed by its tensor copy engine (csrc/cuda/conv2d_sm90.cuh).

It computes from the weights that the Triton backend packs, so a layer takes whichever of the
kernels suits the call (`disco_kernels.cuda.choice`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from disco_kernels.cuda import choice
from disco_kernels.cuda import device as devices
from disco_kernels.cuda.pixels import in_vectors, is_one_row, place
from disco_kernels.spec import ConvSpec
from disco_kernels.triton.arguments import VECTOR_BYTES
from disco_kernels.triton.tables import Lists, num_channels, padded_columns

_DTYPES = (torch.bfloat16, torch.float16)
_ACTIVATIONS = ("none", "relu", "gelu")  # as the kernel numbers them
_PAIR_BYTES = 4  # of a bias
_NOTHING = (0, 0, 0, 0)
_MOST_POSITIONS = 2**30 - 1  # that the kernel's integers count


@lru_cache(maxsize=1)
def _kernel_class() -> Any:
    """The extension's class, or None where it was built without nvcc."""
    try:
        extension = importlib.import_module("disco_kernels._C")
    except ImportError:
        return None
    return getattr(extension, "Conv2dSm90", None)


class Conv2dSm90:
    """One layer. Make it with `make`, and ask `takes` before every `run`."""

    def __init__(self, kernel: Any, spec: ConvSpec, lists: Lists) -> None:
        self._kernel = kernel
        self._activation = _ACTIVATIONS.index(spec.activation)
        self._source = lists.sources[0]
        self._border = max(
            d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)
        )
        self._refused: dict[tuple[int, bool, int], bool] = {}

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
        used = [x, *(tensor for tensor in tensors if tensor is not None)]
        if not choice.is_hopper(x.device) or not x.numel():
            return False
        if any(tensor.dtype != packed_weight.dtype for tensor in used):
            return False
        if packed_weight.data_ptr() % VECTOR_BYTES:
            return False
        # A part of a larger bias may begin in the middle of the pairs that are read.
        if bias is not None and bias.data_ptr() % _PAIR_BYTES:
            return False
        if max(_positions(tensor, self._border) for tensor in used) > _MOST_POSITIONS:
            return False
        if not all(map(in_vectors, used)):
            return False
        asked = (x.shape[3], all(map(is_one_row, used)), tile)
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
                place(x),
                (x.shape[0], x.shape[2], x.shape[3]),
                packed_weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                _NOTHING if residual is None else place(residual),
                place(out),
                self._activation,
                devices.stream_of(x.device),
                tile,
            )


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
