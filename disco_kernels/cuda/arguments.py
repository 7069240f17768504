"""The structures that kernels are given, as in csrc/cuda/arguments.cuh, made from tensors."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_uint32, c_uint64

import torch
from torch import Tensor

MAX_PARTS = 32
MAX_PART_CHANNELS = 4096
THREADS = 256  # of a block

_MOST_PIXELS = 2**31 - 1


class Map(Structure):
    _fields_ = (
        ("address", c_uint64),
        ("stride_image", c_int64),
        ("stride_row", c_int64),
        ("stride_pixel", c_int64),
        ("pixels", c_uint32),
        ("width", c_uint32),
        ("even_rows", c_uint32),
        ("even_images", c_uint32),
    )


class Part(Structure):
    _fields_ = (
        ("message", c_uint64),
        ("row", c_uint32),
        ("first", c_uint32),
        ("groups", c_uint32),
        ("magic", c_uint32),
        ("table", c_uint32),
        ("slots", c_uint32),
    )


class PackArgs(Structure):
    _fields_ = (
        ("x", Map),
        ("table", c_uint64),
        ("num_pixels", c_uint64),
        ("tile_pixels", c_uint32),
        ("num_parts", c_uint32),
        ("parts", Part * MAX_PARTS),
    )


class MagnitudeArgs(Structure):
    _fields_ = (
        ("x", Map),
        ("table", c_uint64),
        ("magnitudes", c_uint64),
        ("num_groups", c_uint32),
        ("chunk_groups", c_uint32),
        ("num_chunks", c_uint32),
        ("splits", c_uint32),
        ("split_pixels", c_uint32),
        ("magic", c_uint32),
    )


class QuantiseArgs(Structure):
    _fields_ = (
        ("x", Map),
        ("table", c_uint64),
        ("slots", c_uint64),
        ("magnitudes", c_uint64),
        ("num_magnitudes", c_uint32),
        ("splits", c_uint32),
        ("images", c_uint32),
        ("tiles", c_uint32),
        ("tile_pixels", c_uint32),
        ("num_parts", c_uint32),
        ("parts", Part * MAX_PARTS),
    )


class WidenArgs(Structure):
    _fields_ = (
        ("out", Map),
        ("message", c_uint64),
        ("scales", c_uint64),
        ("num_pixels", c_uint64),
        ("scale_pixels", c_uint32),
        ("channels", c_uint32),
        ("groups", c_uint32),
        ("magic", c_uint32),
        ("tile_pixels", c_uint32),
        ("unused", c_uint32),
    )


def magic_of(divisor: int) -> int:
    """What ``quotient()`` of the device code multiplies by to divide by ``divisor``."""
    return -(-(2**31) // divisor)


def map_of(x: Tensor) -> Map:
    """Of ``[B, C, H, W]``, channel stride 1, with at least one element.

    Raises ValueError for an image of 2**31 pixels or more.
    """
    batch, _, height, width = x.shape
    pixels = height * width
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"an image may have at most {_MOST_PIXELS} pixels, given {height} x {width}"
        )
    stride_image, _, stride_row, stride_pixel = x.stride()
    if width == 1:  # its stride may be anything
        stride_pixel = stride_row if height > 1 else stride_image
    even_rows = height == 1 or stride_row == width * stride_pixel
    if pixels == 1:
        stride_row = stride_pixel = stride_image
    even_images = even_rows and (batch == 1 or stride_image == pixels * stride_pixel)
    return Map(
        x.data_ptr(), stride_image, stride_row, stride_pixel, pixels, width, even_rows, even_images
    )


def stride_multiple(x: Tensor, values: int) -> bool:
    """Whether all pixels of ``[B, C, H, W]`` lie a multiple of ``values`` elements apart, from an
    address that is one."""
    strides = (x.stride(d) for d in (0, 2, 3) if x.shape[d] > 1)
    aligned = x.data_ptr() % (values * x.element_size()) == 0
    return aligned and all(stride % values == 0 for stride in strides)


NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8"}


def formats(read: torch.dtype, written: torch.dtype) -> str:
    """The part of a kernel's name that says what it reads and writes; 16 bits may be copied."""
    if read == written and read.itemsize == 2:
        return "b16_b16"
    return f"{NAMES[read]}_{NAMES[written]}"
