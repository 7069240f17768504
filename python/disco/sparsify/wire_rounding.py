"""What a wire dtype does to a value, as `disco_kernels.wire` defines it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this a channel is sent as zeros (`disco_kernels.wire`).
_SMALLEST_MAGNITUDE = 2.0**-100
_LARGEST_SCALE = float.fromhex("0x1.020406p+121")


@torch.no_grad()
def rounding_error(x: Tensor, wire: str, dim: int) -> Tensor:
    """What arrives minus what was sent, in the dtype of `x`, without a gradient.

    Args:
        x: floating, channels in `dim`; in int8 each entry of the first other dimension is an image
            and has a scale for every channel.
        wire: float16, bfloat16 or int8.
        dim: of the channels, 0 or more.
    """
    x = x.detach()
    if wire != "int8":
        return x.to(getattr(torch, wire)).to(x.dtype) - x
    rows = x.movedim(dim, -1).float()
    over = tuple(range(1, rows.dim() - 1))
    if rows.numel() == 0:
        return torch.zeros_like(x)
    largest = rows.abs().amax(over, keepdim=True) if over else rows.abs()
    known = largest.isfinite()
    used = known & (largest >= _SMALLEST_MAGNITUDE)
    steps = torch.full_like(largest, 127.0)
    inverse = torch.where(used, steps / largest, 0.0)
    scale = torch.where(
        used,
        (largest / steps).clamp(max=_LARGEST_SCALE),
        torch.where(known, 0.0, torch.nan),
    )
    arrived = (rows * inverse).nan_to_num(0.0).round() * scale
    return arrived.movedim(-1, dim).to(x.dtype) - x
