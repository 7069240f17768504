"""`gather_pack` on a GPU, by every backend that is there, against a plain copy: how much of the
memory's rate it reaches.

    python -m benchmarks.bench_gpu_gather_pack --json FILE

A row a shape, density, wire dtype, way of choosing channels and backend; the backends take turns.
``useful`` counts each selected value read once and written once; ``touched`` counts the sectors of
32 bytes that are read for it; ``moved`` what memory moves at least, 64 bytes at a time. All are
shares of the rate of a large copy. int8 reads its values a second time, because their scales come
first: that counts in none, and takes memory's time only where the map does not fit the second-level
cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

import disco_kernels as dk
from benchmarks.cuda_time import as_graph, copy_gb_s, describe_gpu, replay_ms
from disco_kernels import registry
from disco_kernels.cuda.launcher import get_launcher

SECTOR_BYTES, MOVED_BYTES = 32, 64
# Channels and size of a map, in batches of 64: what ResNet-50 exchanges at the ends of its stages.
MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
CHOICES = ((1.0, 8), (0.2, 8), (0.2, 1), (0.1, 8), (0.1, 1))
WIRES = (torch.bfloat16, torch.int8)
BACKENDS = ("triton", "cuda")
CALLS, ROUNDS = 10, 9


def chosen(channels: int, density: float, group: int) -> list[int]:
    """Of the first half of the channels, which one of two nodes owns."""
    groups = channels // 2 // group
    picked = torch.randperm(groups)[: max(1, int(density * groups))].sort().values.tolist()
    return [g * group + c for g in picked for c in range(group)]


def measure(
    channels: int,
    size: int,
    density: float,
    group: int,
    wire: torch.dtype,
    rate: float,
    backends: list[str],
) -> list[dict[str, Any]]:
    """A row a backend."""
    x = torch.randn(64, channels, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    listed = chosen(channels, density, group)
    wanted = dk.GatherPack([listed], "reference", wire_dtype=wire)(x[:2].cpu())[0]
    pixels = 64 * size * size

    def read_bytes(at_once: int) -> int:
        return pixels * at_once * len({c * x.element_size() // at_once for c in listed})

    graphs, written, kept = [], 0, []
    for backend in backends:
        pack = dk.GatherPack([listed], backend, wire_dtype=wire)
        few = pack(x[:2])[0].cpu()
        assert torch.equal(few.view(torch.uint8), wanted.view(torch.uint8)), backend
        run = pack.bind(x, messages := pack(x))
        kept.append((pack, run, messages))  # what a graph writes to has to stay
        graphs.append(as_graph(run, CALLS))
        written = messages[0].nbytes
    useful = pixels * len(listed) * x.element_size() + written
    touched, moved = (read_bytes(n) + written for n in (SECTOR_BYTES, MOVED_BYTES))
    rows = []
    for backend, times in zip(backends, replay_ms(graphs, ROUNDS, CALLS), strict=True):
        milliseconds = statistics.median(times)
        rows.append(
            {
                "map": [64, channels, size, size],
                "density": density,
                "group": group,
                "wire": str(wire),
                "backend": backend,
                "ms": milliseconds,
                "ms_min": min(times),
                "ms_max": max(times),
                "useful": useful / milliseconds / 1e6 / rate,
                "touched": touched / milliseconds / 1e6 / rate,
                "moved": moved / milliseconds / 1e6 / rate,
            }
        )
    return rows


def available() -> list[str]:
    """Prints why a backend is left out."""
    found = []
    for name in BACKENDS:
        reason = registry.refusal(name, torch.device("cuda"), torch.bfloat16, "gather_pack")
        if reason is None:
            found.append(name)
        else:
            print(f"without {name}: {reason}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", help="write the rows here, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    rate, backends = copy_gb_s(), available()
    launcher = get_launcher().name if "cuda" in backends else None
    print(f"{torch.cuda.get_device_name()}, copy {rate:.0f} GB/s, cuda kernels by {launcher}")
    rows, failures = [], 0
    for channels, size in MAPS:
        for density, group in CHOICES:
            for wire in WIRES:
                try:
                    made = measure(channels, size, density, group, wire, rate, backends)
                except Exception as error:  # noqa: BLE001 - the other rows are worth having
                    what = f"{channels} x {size}x{size}, {density}, groups of {group}, {wire}"
                    print(f"Error: {what}: {type(error).__name__}: {error}")
                    failures += 1
                    continue
                rows += made
                for row in made:
                    print(
                        f"{channels:5d} x {size}x{size} density {density} groups of {group} "
                        f"{row['wire']:15s} {row['backend']:7s} {row['ms']:.4f} ms "
                        f"({row['ms_min']:.4f} to {row['ms_max']:.4f}), useful "
                        f"{row['useful']:.2f}, touched {row['touched']:.2f}, "
                        f"moved {row['moved']:.2f}"
                    )
    if args.json:
        machine = {"machine": describe_gpu(), "copy_gb_s": rate, "cuda_launcher": launcher}
        with open(args.json, "w") as file:
            json.dump({**machine, "rows": rows}, file)
    if failures:
        raise SystemExit(f"{failures} rows failed")


if __name__ == "__main__":
    main()
