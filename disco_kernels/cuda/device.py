"""What launches ask torch about a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

import torch


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes ``device`` the current one."""
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The cudaStream_t that torch's operators on ``device`` go to now."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def capturing() -> bool:
    """Whether what is started now becomes part of a CUDA graph. On a thread whose first work this
    is, it also makes the device's context current, which the driver's own functions need."""
    return torch.cuda.is_current_stream_capturing()
