"""The Triton backend: NVIDIA GPUs, or CPU tensors in Triton's interpreter.

Triton is imported when a tensor that this backend could serve is first seen, not before.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from disco_kernels.registry import Backend, PreparedConv2d, PreparedGatherPack, register
from disco_kernels.spec import Conv2dDescriptor, ConvSpec, GroupedDescriptor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: bfloat16 products and asynchronous copies
_FEWEST_COLUMNS = 64  # of a node that runs beside others
_VECTOR = 8  # columns of a packed weight are padded to whole vectors (triton/tables.py)


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which takes tensors in CPU memory."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class TritonBackend(Backend):
    name = "triton"

    @property
    def automatic(self) -> bool:
        return not interpreted()  # which is for tests: a thousand times slower

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        wanted = "cpu" if interpreted() else "cuda"
        if device.type != wanted:
            return f"tensors on {wanted} devices only, given {device}"
        if dtype not in _DTYPES:
            return f"float32, bfloat16 and float16 only, given {dtype}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed: pip install triton"
        if device.type == "cuda":
            if torch.version.hip is not None:
                return "NVIDIA GPUs only, and this torch is built for ROCm"
            found = torch.cuda.get_device_capability(device)
            if found < _OLDEST:
                return f"compute capability 8.0 or newer only, given {found[0]}.{found[1]}"
        return None

    def packed_numel(
        self,
        out_channels: int,
        segment_channels: Sequence[int],
        taps: int,
        dtype: torch.dtype,
        algorithm: str = "off",
    ) -> int:
        return taps * sum(segment_channels) * (-(-out_channels // _VECTOR) * _VECTOR)

    def prepack(
        self, weight: Tensor, segment_channels: Sequence[int], algorithm: str = "off"
    ) -> Tensor:
        _refuse_algorithm(algorithm)
        outputs, inputs, kh, kw = weight.shape
        packed = weight.new_zeros((kh, kw, inputs, -(-outputs // _VECTOR) * _VECTOR))
        packed[..., :outputs] = weight.detach().permute(2, 3, 1, 0)
        return packed.view(-1)

    def prepare(
        self, descriptor: Conv2dDescriptor, dtype: torch.dtype, pack: Sequence[Tensor] = ()
    ) -> PreparedConv2d:
        _refuse_algorithm(descriptor.spec.algorithm)
        from disco_kernels.triton.launch import TritonConv2d

        return TritonConv2d(descriptor, dtype, pack)

    def dense_is_faster(self, descriptor: Conv2dDescriptor, dtype: torch.dtype) -> bool:
        # A tile of fewer columns leaves the matrix units idle while it waits for its pixels, which
        # every node reads again. ResNet-50's first 3 x 3 layers, two nodes of 32 columns, bfloat16,
        # 128 images on an H100: see benchmarks/results.
        if dtype.itemsize > 2 or len(descriptor.nodes) < 2:
            return False
        return max(node.out_channels.count for node in descriptor.nodes) < _FEWEST_COLUMNS

    def dense_beside(
        self, descriptor: Conv2dDescriptor, dtype: torch.dtype, device: torch.device
    ) -> bool:
        from disco_kernels.cuda import choice
        from disco_kernels.cuda.dense_product import DenseProduct
        from disco_kernels.triton.tables import Lists

        if len(descriptor.nodes) < 2 or not choice.is_hopper(device):
            return False
        lists = Lists.of(descriptor)
        if choice.CUBLAS not in choice.measured(choice.Key.of(lists, descriptor.spec)).values():
            return False
        return DenseProduct.make(lists, descriptor.spec, dtype) is not None

    def groups_as_nodes(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> bool:
        return descriptor.in_per_group > 1

    def grouped_numel(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> int:
        if self.groups_as_nodes(descriptor, dtype):
            return super().grouped_numel(descriptor, dtype)
        kh, kw = descriptor.spec.kernel_size
        return descriptor.out_channels * kh * kw

    def prepack_grouped(self, weight: Tensor, descriptor: GroupedDescriptor) -> Tensor:
        if self.groups_as_nodes(descriptor, weight.dtype):
            return super().prepack_grouped(weight, descriptor)
        return weight.detach()[:, 0].permute(1, 2, 0).reshape(-1).clone()

    def prepare_grouped(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> PreparedConv2d:
        _refuse_algorithm(descriptor.spec.algorithm)
        if self.groups_as_nodes(descriptor, dtype):
            return super().prepare_grouped(descriptor, dtype)
        from disco_kernels.triton.launch_depthwise import TritonDepthwise

        return TritonDepthwise(descriptor)

    def max_pool2d_(self, x: Tensor, window: ConvSpec, out: Tensor) -> None:
        from disco_kernels.triton.launch_pool import max_pool2d_

        max_pool2d_(x, window, out)

    def global_avg_pool2d_(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        from disco_kernels.triton.launch_pool import global_avg_pool2d_

        def run() -> None:
            global_avg_pool2d_(x, out)

        run()
        return run

    def prepare_gather_pack(self, index: Sequence[Tensor]) -> PreparedGatherPack:
        from disco_kernels.triton.launch_pack import TritonGatherPack

        return TritonGatherPack(index)


def _refuse_algorithm(algorithm: str) -> None:
    if algorithm != "off":
        raise ValueError(
            f"backend 'triton' computes convolutions directly, asked for {algorithm!r}; use "
            "winograd='off' and no input_bytes"
        )


register(TritonBackend())
