"""A tensor's memory as bytes, for sockets."""

from __future__ import annotations

import ctypes

from torch import Tensor

from disco.errors import TransportError


def bytes_of(buffer: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, not copied; keep the tensor alive.

    `Tensor.numpy` would do for the dtypes that it knows, at four times the cost.
    """
    if buffer.device.type != "cpu":
        raise TransportError(
            f"the tcp transport carries tensors in CPU memory, given one on {buffer.device}: use "
            f"the torch transport"
        )
    assert buffer.is_contiguous(), "a payload is contiguous"
    kind = ctypes.c_char * buffer.nbytes
    return memoryview(kind.from_address(buffer.data_ptr())).cast("B")
