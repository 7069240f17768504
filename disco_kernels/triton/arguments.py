"""What kernels are given beside tensors: strides, geometry, and what depends on sizes."""

from __future__ import annotations

from torch import Tensor

from disco_kernels.spec import ConvSpec

VECTOR_BYTES = 16  # of the widest load
_INT32_MAX = 2**31 - 1


def geometry(spec: ConvSpec) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    values = (*spec.kernel_size, *spec.stride, *spec.padding, *spec.dilation)
    return dict(zip(names, values, strict=True))


def strides(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.stride()
    return n, c if x.shape[1] > 1 else 1, h, w


def pixel_strides(x: Tensor) -> tuple[int, int, int]:
    n, _, h, w = x.stride()
    return n, h, w


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of these need 64 bits."""
    return any(x is not None and _extent(x) > _INT32_MAX for x in tensors)


def _extent(x: Tensor) -> int:
    pairs = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * abs(stride) for size, stride in pairs) if x.numel() else 0


def power_of_two(value: int) -> int:
    return 1 << (max(value, 1) - 1).bit_length()
