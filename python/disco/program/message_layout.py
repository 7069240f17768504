"""What a message between ranks holds: the plan counts bytes by it, the executor allocates by it.

A message is the payloads of one exchange, one behind the other, each at a multiple of what its
elements need. A payload is in the dtype of its value or in a wire dtype. In the wire dtype int8 it
has float32 scales before its values and zeros behind them, up to a multiple of 4 bytes
(`disco_kernels.wire` has the layout).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")
# Of the scales of an int8 payload.
SCALE_BYTES = 4


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a torch dtype, given by name."""
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype), dtype
    return found.itemsize


def is_floating(dtype: str) -> bool:
    """True for names of torch's floating dtypes; False for others and for "int" and "tuple"."""
    found = getattr(torch, dtype, None)
    return isinstance(found, torch.dtype) and found.is_floating_point


def payload_bytes(wire: str, values: int, scales: int) -> int:
    """Bytes of a payload.

    Args:
        wire: dtype that it travels in.
        values: elements.
        scales: of an int8 payload of floats; 0 for one without scales, which has no padding either.
    """
    if not scales:
        return values * item_bytes(wire)
    return _up(SCALE_BYTES * scales + values, SCALE_BYTES)


def alignment(wire: str, scaled: bool) -> int:
    """A payload begins at a multiple of this many bytes; `scaled` if it begins with scales."""
    return SCALE_BYTES if scaled else item_bytes(wire)


def offsets(sizes: Sequence[int], alignments: Sequence[int]) -> tuple[list[int], int]:
    """Where in a message its payloads begin, and the bytes of the whole message."""
    begin: list[int] = []
    end = 0
    for size, step in zip(sizes, alignments, strict=True):
        # What is not there needs no room to begin at.
        begin.append(_up(end, step) if size else end)
        end = begin[-1] + size
    return begin, end


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
