"""The CUDA C++ backend: NVIDIA GPUs, so far for the messages of an exchange only.

Its kernels are in the extension where that was built with nvcc; elsewhere CuPy compiles the same
sources. CuPy is imported when the first message is packed, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from disco_kernels.cuda.launcher import launcher_refusal
from disco_kernels.registry import (
    Backend,
    BackendUnavailable,
    PreparedConv2d,
    PreparedGatherPack,
    Work,
    register,
)
from disco_kernels.spec import Conv2dDescriptor, ConvSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: conversions to bfloat16
_NO_LAYERS = "it has no layers, only gather_pack; for layers on a GPU ask for triton"


class CudaBackend(Backend):
    name = "cuda"

    def lacks(self, work: Work) -> str | None:
        return None if work == "gather_pack" else _NO_LAYERS

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"tensors on cuda devices only, given {device}"
        if dtype not in _DTYPES:
            return f"float32, bfloat16 and float16 only, given {dtype}"
        if torch.version.hip is not None:
            return "NVIDIA GPUs only, and this torch is built for ROCm"
        found = torch.cuda.get_device_capability(device)
        if found < _OLDEST:
            return f"compute capability 8.0 or newer only, given {found[0]}.{found[1]}"
        return launcher_refusal()

    def prepare_gather_pack(self, index: Sequence[Tensor]) -> PreparedGatherPack:
        from disco_kernels.cuda.launch_pack import CudaGatherPack

        return CudaGatherPack(index)

    # `registry.resolve` comes here for no layer; whoever does gets the reason.

    def packed_numel(
        self,
        out_channels: int,
        segment_channels: Sequence[int],
        taps: int,
        dtype: torch.dtype,
        algorithm: str = "off",
    ) -> int:
        _refuse()

    def prepack(
        self, weight: Tensor, segment_channels: Sequence[int], algorithm: str = "off"
    ) -> Tensor:
        _refuse()

    def prepare(
        self, descriptor: Conv2dDescriptor, dtype: torch.dtype, pack: Sequence[Tensor] = ()
    ) -> PreparedConv2d:
        _refuse()

    def max_pool2d_(self, x: Tensor, window: ConvSpec, out: Tensor) -> None:
        _refuse()

    def global_avg_pool2d_(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        _refuse()


def _refuse() -> NoReturn:
    raise BackendUnavailable(f"backend 'cuda': {_NO_LAYERS}")


register(CudaBackend())
