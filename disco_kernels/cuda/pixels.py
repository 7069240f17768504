"""How maps ``[B, C, H, W]`` lie in memory, as kernels for Hopper are told."""

from __future__ import annotations

from torch import Tensor

from disco_kernels.triton.arguments import VECTOR_BYTES, pixel_strides


def place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of images, rows and pixels; those of a single one follow the others."""
    image, row, pixel = pixel_strides(x)
    if x.shape[3] == 1:
        pixel = row if x.shape[2] > 1 else image
    if x.shape[2] == 1:
        row = x.shape[3] * pixel
    if x.shape[0] == 1:
        image = x.shape[2] * row
    return x.data_ptr(), image, row, pixel


def is_one_row(x: Tensor) -> bool:
    """Whether the pixels of all images lie at one distance from each other."""
    _, image, row, pixel = place(x)
    return row == x.shape[3] * pixel and image == x.shape[2] * row


def in_vectors(x: Tensor) -> bool:
    """Whether every pixel's channels are neighbours, from a multiple of 16 bytes on."""
    vector = VECTOR_BYTES // x.element_size()
    address, *strides = place(x)
    if (x.stride(1) != 1 and x.shape[1] > 1) or address % VECTOR_BYTES:
        return False
    return all(stride > 0 and stride % vector == 0 for stride in strides)
