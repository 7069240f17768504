"""`gather_pack` on a GPU against a plain copy: how much of the memory's rate it reaches.

    python -m benchmarks.bench_gpu_gather_pack --json FILE

A row a shape, density, wire dtype and way of choosing channels. ``useful`` counts each selected
value read once and written once; ``touched`` counts what memory moves for it, in sectors of 32
bytes. Both are shares of the rate of a large copy.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import disco_kernels as dk
from benchmarks.cuda_time import copy_gb_s, describe_gpu, median_ms

SECTOR_BYTES = 32
# Channels and size of a map, in batches of 64: what ResNet-50 exchanges at the ends of its stages.
MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
WIRES = (torch.bfloat16, torch.int8)


def chosen(channels: int, density: float, group: int) -> list[int]:
    """Of the first half of the channels, which one of two nodes owns."""
    groups = channels // 2 // group
    picked = torch.randperm(groups)[: max(1, int(density * groups))].sort().values.tolist()
    return [g * group + c for g in picked for c in range(group)]


def measure(
    channels: int, size: int, density: float, group: int, wire: torch.dtype, rate: float
) -> dict[str, Any]:
    """One row."""
    x = torch.randn(64, channels, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    listed = chosen(channels, density, group)
    pack = dk.GatherPack([listed], wire_dtype=wire)
    messages = pack(x)
    few = pack(x[:2])[0].cpu()
    wanted = dk.GatherPack([listed], "reference", wire_dtype=wire)(x[:2].cpu())[0]
    assert torch.equal(few.view(torch.uint8), wanted.view(torch.uint8))
    milliseconds = median_ms(lambda: pack(x, messages))
    pixels = 64 * size * size
    written = messages[0].nbytes
    sectors = len({c * x.element_size() // SECTOR_BYTES for c in listed})
    useful = pixels * len(listed) * x.element_size() + written
    touched = pixels * sectors * SECTOR_BYTES + written
    return {
        "map": [64, channels, size, size],
        "density": density,
        "group": group,
        "wire": str(wire),
        "ms": milliseconds,
        "useful": useful / milliseconds / 1e6 / rate,
        "touched": touched / milliseconds / 1e6 / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}, copy {rate:.0f} GB/s")
    rows = []
    for channels, size in MAPS:
        for density, group in ((1.0, 8), (0.2, 8), (0.2, 1), (0.1, 8)):
            for wire in WIRES:
                row = measure(channels, size, density, group, wire, rate)
                rows.append(row)
                print(
                    f"{channels:5d} x {size}x{size} density {density} groups of {group} "
                    f"{row['wire']:15s} {row['ms']:.4f} ms, useful {row['useful']:.2f}, touched "
                    f"{row['touched']:.2f}"
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": describe_gpu(), "copy_gb_s": rate, "rows": rows}, file)


if __name__ == "__main__":
    main()
