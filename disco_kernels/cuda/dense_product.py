"""Layers of single pixels as one dense product, by cuBLASLt: the fallback to the vendor's kernels.

Where single pixels are narrow or many, reading and writing them takes longer than the products that
a pattern leaves out, and NVIDIA's loop is the faster one. Which layers those are was measured
(`disco_kernels.cuda.tuned`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from disco_kernels.cuda import cublas_lt
from disco_kernels.cuda import device as devices
from disco_kernels.cuda.pixels import in_vectors, is_one_row, place
from disco_kernels.spec import ConvSpec
from disco_kernels.triton.arguments import VECTOR_BYTES
from disco_kernels.triton.tables import Lists, padded_columns

_DTYPES = (torch.bfloat16, torch.float16)
# GELU is left out: cuBLASLt's is the approximation by tanh.
_ACTIVATIONS = ("none", "relu")
_MOST_PIXELS = 2**31 - 1
_VECTOR = 8  # numbers of 16 bytes
_PLANS_KEPT = 64  # of a layer: one for every number of pixels


class DenseProduct:
    """One layer. Make it with `make`.

    Attributes:
        inputs: channels of the input that it reads, from the first on: all that any node reads.
        num_weights: elements of its weights, ``[inputs][columns]`` as the Triton backend packs
            those of a node with as many inputs; zeros where a node has no weights.
    """

    def __init__(self, lists: Lists, relu: bool) -> None:
        self._source = lists.sources[0]
        self._outputs = sum(map(len, lists.outputs))
        self._relu = relu
        self._is_dense = _is_dense(lists)
        self._plans: dict[tuple[cublas_lt.Product, torch.device], cublas_lt.Plan] = {}
        self.inputs = 1 + max(lists.largest_channel.values())
        self.num_weights = self.inputs * padded_columns(self._outputs)

    @classmethod
    def make(cls, lists: Lists, spec: ConvSpec, dtype: torch.dtype) -> DenseProduct | None:
        """None for a layer that is no such product."""
        single = spec.kernel_size == (1, 1) == spec.stride and spec.padding == (0, 0)
        if not single or dtype not in _DTYPES or spec.activation not in _ACTIVATIONS:
            return None
        outputs = sorted(channel for outputs in lists.outputs for channel in outputs)
        if len(set(lists.sources)) != 1 or not outputs or outputs != list(range(len(outputs))):
            return None
        found = cls(lists, spec.activation == "relu")
        return None if found.inputs % _VECTOR else found

    def of_packed(self, packed_weight: Tensor, num_nodes_weights: int) -> Tensor | None:
        """Its weights in those of a layer, whose nodes' weights come first, or None."""
        if self._is_dense and packed_weight.numel() == num_nodes_weights:
            return packed_weight
        if packed_weight.numel() != num_nodes_weights + self.num_weights:
            return None
        return packed_weight[num_nodes_weights:]

    def bind(
        self,
        sources: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
    ) -> Callable[[], None] | None:
        """What writes ``out`` ``[B, O, H, W]``; ``weight`` is that of `of_packed`. None unless all
        are rows of numbers at one distance, which the library takes."""
        x = sources[self._source]
        used = [x, out] if residual is None else [x, out, residual]
        if weight.dtype not in _DTYPES or any(tensor.dtype != weight.dtype for tensor in used):
            return None
        if not x.numel() or out.numel() // self._outputs > _MOST_PIXELS:
            return None
        if not _aligned(weight) or not (bias is None or _aligned(bias)):
            return None
        if x.shape[1] < self.inputs or out.shape[1] != self._outputs:
            return None
        if not all(in_vectors(tensor) and is_one_row(tensor) for tensor in used):
            return None
        plan = self._plan(self._product(x, bias, out, residual), x.device)
        if plan is None or not plan.possible:
            return None
        return partial(plan.run, x, weight, residual, out)

    def _plan(self, product: cublas_lt.Product, device: torch.device) -> cublas_lt.Plan | None:
        """None where the library is not there or cannot be asked now."""
        capturing = devices.capturing()
        found = self._plans.get((product, device))
        if found is not None or capturing or cublas_lt.library() is None:
            return found
        try:
            found = cublas_lt.Plan(product, device)
        except RuntimeError:  # it may answer later
            return None
        if len(self._plans) == _PLANS_KEPT:
            self._plans.clear()
        self._plans[product, device] = found
        return found

    def _product(
        self, x: Tensor, bias: Tensor | None, out: Tensor, residual: Tensor | None
    ) -> cublas_lt.Product:
        return cublas_lt.Product(
            m=out.numel() // self._outputs,
            n=self._outputs,
            k=self.inputs,
            x_stride=place(x)[3],
            weight_stride=padded_columns(self._outputs),
            out_stride=place(out)[3],
            residual_stride=0 if residual is None else place(residual)[3],
            bias=0 if bias is None else bias.data_ptr(),
            relu=self._relu,
            dtype=out.dtype,
        )


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % VECTOR_BYTES == 0


def _is_dense(lists: Lists) -> bool:
    """Whether there is one node, which reads and writes every channel, in their order."""
    if len(lists.outputs) != 1 or list(lists.outputs[0]) != sorted(lists.outputs[0]):
        return False
    parts = sorted(lists.inputs[0], key=lambda part: part.before)
    read = [channel for part in parts for channel in part.channels]
    return read == list(range(len(read)))
