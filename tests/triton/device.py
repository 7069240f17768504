"""Where the Triton tests run: a GPU, or Triton's interpreter with tensors in CPU memory."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from disco_kernels.backends.triton import interpreted

REQUIRE_VARIABLE = "DISCO_KERNELS_REQUIRE_GPU"


def find_device() -> str | None:
    """ "cuda", "cpu" for the interpreter, or None."""
    if interpreted():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


DEVICE = find_device()
NO_DEVICE = "no CUDA device and no TRITON_INTERPRET=1 (test_interpreter.py runs this file with it)"
needs_device = pytest.mark.skipif(DEVICE is None, reason=NO_DEVICE)
if DEVICE is None and os.environ.get(REQUIRE_VARIABLE) == "1":
    raise RuntimeError(f"{REQUIRE_VARIABLE}=1, but {NO_DEVICE}")

# Triton's interpreter multiplies bfloat16 wrongly (triton#11584).
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def there(x: Tensor) -> Tensor:
    """``x`` on the device, with the strides that it has and what lies between."""
    if DEVICE in (None, "cpu"):
        return x
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def optional_there(x: Tensor | None) -> Tensor | None:
    return None if x is None else there(x)
