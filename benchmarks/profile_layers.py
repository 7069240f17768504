"""Runs layers once each for a profiler, with every tile of the CUDA C++ kernel for Hopper and with
Triton's choice:

    ncu --profile-from-start off --print-details all --section SpeedOfLight ... \\
        python -m benchmarks.profile_layers --batch 128

Prints what was run, in the order in which the profiler numbers the launches. Warming up is outside
of what it sees. `benchmarks/gpu.sh` has the whole command in its step "profile".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bench_triton_tiles import (
    DTYPES,
    Layer,
    dense_fused,
    make_layer,
    run_sm90,
    run_with,
    sm90_tiles,
)
from benchmarks.shapes import ConvShape, deit_small_shapes

# ResNet-50's windows of each width, a layer that is bound by memory, and DeiT-small's first linear.
SHAPES = (
    ConvShape(64, 64, 3, 1, 56),
    ConvShape(128, 128, 3, 1, 28),
    ConvShape(256, 256, 3, 1, 14),
    ConvShape(512, 512, 3, 1, 7),
    ConvShape(256, 256, 3, 2, 28),
    ConvShape(1024, 256, 1, 1, 14, residual=True),
    deit_small_shapes()[0],
)


def ways(layer: Layer) -> dict[str, Callable[[], object]]:
    """What is to be run of a layer, by name."""
    found: dict[str, Callable[[], object]] = {
        f"sm90 {tile}": partial(run_sm90, layer, tile) for tile in sm90_tiles(layer)
    }
    found["triton"] = partial(run_with, layer, None)
    found["cudnn, dense"] = partial(dense_fused, layer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    runs = [
        (f"{shape} {name}", way)
        for shape in SHAPES
        for name, way in ways(
            make_layer(shape, args.batch, args.density, DTYPES[args.dtype])
        ).items()
    ]
    fitting = []
    for name, way in runs:
        try:
            for _ in range(3):
                way()
        except (ValueError, RuntimeError) as error:  # a tile that does not fit this layer
            print(f"{name}: {error}")
        else:
            fitting.append((name, way))
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for number, (name, way) in enumerate(fitting):
        print(number, name, flush=True)
        way()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
