"""Tests that need a CUDA device: skipped without one, an error where one was promised."""

from __future__ import annotations

import os

import pytest
import torch

REQUIRE_VARIABLE = "DISCO_KERNELS_REQUIRE_GPU"
NO_GPU = "no CUDA device"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]
if os.environ.get(REQUIRE_VARIABLE) == "1" and not torch.cuda.is_available():
    raise RuntimeError(f"{REQUIRE_VARIABLE}=1, but {NO_GPU}")
