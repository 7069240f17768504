"""`gather_pack` against ``index_select`` into a contiguous message, for one destination."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import disco_kernels as dk

DENSITY = 0.2
# Channels and side of the maps that ResNet-50 exchanges at 224 x 224, as one of two ranks owns
# them.
MAPS = [(32, 56), (128, 56), (64, 28), (256, 28), (128, 14), (512, 14), (256, 7), (1024, 7)]


@pytest.mark.parametrize("side", ["fused", "unfused"])
@pytest.mark.parametrize(("channels", "size"), MAPS)
def test_gather_pack(benchmark: Any, channels: int, size: int, side: str) -> None:
    benchmark.group = f"gather_pack {channels}x{size}x{size}"
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(channels, generator=generator)[: int(DENSITY * channels)].sort().values
    x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
    message = torch.empty(1, size, size, len(chosen))
    pack = dk.GatherPack([chosen], backend="cpu")

    def fused() -> Tensor:
        return pack(x, [message])[0]

    def unfused() -> Tensor:
        return message.copy_(x.index_select(1, chosen).permute(0, 2, 3, 1))

    run = fused if side == "fused" else unfused
    with torch.inference_mode():
        assert torch.equal(run(), x[:, chosen].permute(0, 2, 3, 1))
        benchmark(run)
    if benchmark.stats is not None:
        written = message.numel() * message.element_size()
        benchmark.extra_info["written_gb_per_s"] = round(
            written / benchmark.stats["median"] / 1e9, 2
        )
    benchmark.extra_info["threads"] = torch.get_num_threads()
