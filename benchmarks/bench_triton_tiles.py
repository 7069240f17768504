"""Which tile suits which layer: every candidate on every shape, on the GPU at hand.

    python -m benchmarks.bench_triton_tiles --batches 1,32,128 --json FILE

Prints a row a layer: the fastest tile, the one that the backend chooses, both times, cuDNN's time
for the dense convolution alone (no bias, no activation), with what belongs to the layer (bias,
residual, activation), and node by node on packed inputs, cuBLASLt's for the layer as one dense
product (where it is one), and the time that the layer's bytes take at the measured copy rate.
`disco_kernels/triton/tiles.py` holds what was learnt from it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from benchmarks.cuda_time import copy_gb_s, describe_gpu, median_ms
from benchmarks.shapes import ConvShape, deit_small_shapes, resnet50_shapes
from disco_kernels import registry
from disco_kernels.cuda.choice import CUBLAS
from disco_kernels.pattern import Selected, find_selected
from disco_kernels.triton.tiles import Tile

GROUP = 8  # channels that are selected together
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# m, n, k, warps, stages
CANDIDATES = (
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 2),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (256, 64, 64, 8, 3),
    (64, 256, 64, 8, 3),
    (256, 64, 64, 4, 3),
    (128, 64, 64, 4, 2),
    (128, 64, 64, 4, 3),
    (128, 64, 32, 4, 3),
    (64, 128, 64, 4, 2),
    (64, 128, 64, 4, 3),
    (64, 128, 32, 4, 3),
    (64, 64, 64, 4, 2),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 4, 4),
    (128, 32, 64, 4, 3),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 128, 64, 4, 3),
    (32, 32, 64, 4, 5),
)
LISTED = (16, 32, 64)


@dataclass(frozen=True)
class Layer:
    """A layer of the benchmark, ready to run."""

    shape: ConvShape
    kernel: dk.GatherConv2d
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    out: Tensor


def selected_in_groups(shape: ConvShape, density: float) -> tuple[dk.Ownership, dk.Ownership, Any]:
    """Two nodes; of every 8 channels that the other owns all or none."""
    inputs = dk.Ownership.contiguous(shape.in_channels, 2)
    half = shape.out_channels // shape.parts // 2
    begins = range(0, shape.out_channels, 2 * half)
    out = dk.Ownership(
        tuple(tuple(b + node * half + c for b in begins for c in range(half)) for node in range(2))
    )
    rows = []
    for receiver in range(2):
        owned = inputs.channels[1 - receiver]
        groups = [owned[i : i + GROUP] for i in range(0, len(owned), GROUP)]
        count = int(density * len(groups))  # as `disco.sparsify_`
        picked = torch.randperm(len(groups))[:count].sort().values.tolist()
        taken = tuple(c for g in picked for c in groups[g])
        rows.append(((), taken) if receiver == 0 else (taken, ()))
    return out, inputs, tuple(rows)


def make_layer(shape: ConvShape, batch: int, density: float, dtype: torch.dtype) -> Layer:
    """Random values; the weights keep the pattern."""
    out, inputs, selected = selected_in_groups(shape, density)
    size = (shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    weight = torch.randn(size) / (shape.in_channels * shape.kernel**2) ** 0.5
    weight *= _mask(size, out, inputs, selected)
    weight = weight.to("cuda", dtype)
    assert find_selected(weight.float().cpu(), out, inputs) == selected
    bias = torch.randn(shape.out_channels, device="cuda", dtype=dtype)
    spec = dk.ConvSpec(
        (shape.kernel,) * 2,
        (shape.stride,) * 2,
        (shape.padding,) * 2,
        activation=shape.activation,
    )
    kernel = dk.GatherConv2d(weight, out, inputs, selected, spec, bias=bias, backend="triton")
    last = torch.channels_last
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size, device="cuda", dtype=dtype)
    result = torch.empty(
        (batch, shape.out_channels, shape.out_size, shape.out_size), device="cuda", dtype=dtype
    ).to(memory_format=last)
    residual = torch.randn_like(result) if shape.residual else None
    # In cuDNN's layout, which it would otherwise be copied into at every call.
    dense = weight.to(memory_format=last)
    return Layer(shape, kernel, x.to(memory_format=last), residual, dense, bias, result)


def _mask(
    size: tuple[int, ...], out: dk.Ownership, inputs: dk.Ownership, selected: Selected
) -> Tensor:
    mask = torch.zeros(size[:2])
    for rank, outputs in enumerate(out.channels):
        read = [*inputs.channels[rank], *(c for row in selected[rank] for c in row)]
        mask[torch.tensor(outputs)[:, None], torch.tensor(read)] = 1
    return mask[:, :, None, None]


def tiles_for(layer: Layer) -> list[Tile]:
    """The candidates that make sense for a layer."""
    columns = max(node.out_channels.count for node in layer.kernel.descriptor.nodes)
    listed = layer.kernel._prepared.lists.longest_list  # type: ignore[attr-defined]
    g = next(size for size in LISTED if size >= min(listed, LISTED[-1]))
    return [
        Tile(m, n, k, g, warps, stages)
        for m, n, k, warps, stages in CANDIDATES
        if n <= max(32, columns)
    ]


def run_with(layer: Layer, tile: Tile | None) -> Tensor:
    """The layer with this tile, or with the backend's choice."""
    layer.kernel._prepared.tile = tile  # type: ignore[attr-defined]
    return layer.kernel(layer.x, layer.residual, layer.out)


def sm90_tiles(layer: Layer) -> list[str]:
    """Tiles of the CUDA C++ kernel that make sense, none where it does not compute this layer."""
    conv2d = layer.kernel._prepared.sm90  # type: ignore[attr-defined]
    if conv2d is None:
        return []
    columns = layer.kernel._prepared.key.columns  # type: ignore[attr-defined]
    width = 2 * max(32, columns)
    return [t for t in conv2d.tiles() if int(t.split("x")[1].split("/")[0]) < width]


def run_sm90(layer: Layer, tile: str) -> Tensor:
    """The layer with this tile of the CUDA C++ kernel."""
    conv2d, weight = layer.kernel._prepared.sm90, layer.kernel.packed_weight  # type: ignore[attr-defined]
    assert conv2d.takes([layer.x], weight, layer.bias, (layer.out, layer.residual))
    place = conv2d.tiles().index(tile)
    conv2d.run([layer.x], weight, layer.bias, layer.residual, layer.out, place)
    return layer.out


def dense_product(layer: Layer) -> Callable[[], Tensor] | None:
    """The layer as one dense product by cuBLASLt, if it is one."""
    prepared: Any = layer.kernel._prepared
    if prepared.dense is None:
        return None
    backend = registry.get("triton")
    weight = backend.prepack(layer.weight, (layer.shape.in_channels,))
    start = prepared.dense.bind([layer.x], weight, layer.bias, layer.residual, layer.out)
    if start is None:
        print(f"{layer.shape}: cuBLASLt does not take it")
        return None

    def run() -> Tensor:
        start()
        return layer.out

    return run


def exact_result(layer: Layer) -> Tensor:
    """A float32 convolution of the same numbers."""
    size = layer.shape
    with torch.backends.cudnn.flags(allow_tf32=False, benchmark=False):
        exact = F.conv2d(
            layer.x.float(), layer.weight.float(), layer.bias.float(), size.stride, size.padding
        )
    if layer.residual is not None:
        exact += layer.residual.float()
    return activated(exact, size.activation)


def activated(x: Tensor, activation: str) -> Tensor:
    """As the layer's epilogue does."""
    return {"relu": F.relu, "gelu": F.gelu, "none": lambda y: y}[activation](x)


def vendor_layer(
    shape: ConvShape, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """cuDNN's convolution with bias, residual and ReLU in it; where another function comes last, as
    torch computes it, single pixels by its linear."""
    window = ((shape.stride,) * 2, (shape.padding,) * 2, (1, 1), 1)
    if shape.activation == "relu" and residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *window)
    if shape.activation == "relu":
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *window)
    if (shape.kernel, shape.stride) == (1, 1):
        out = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    else:
        out = F.conv2d(x, weight, bias, shape.stride, shape.padding)
    return activated(out if residual is None else out + residual, shape.activation)


def dense_fused(layer: Layer) -> Tensor:
    """The dense layer with all that belongs to it."""
    return vendor_layer(layer.shape, layer.x, layer.weight, layer.bias, layer.residual)


def cudnn_packed(layer: Layer) -> Callable[[], Tensor]:
    """cuDNN node by node on packed inputs: a gather, the fused convolution, and a copy to where the
    node's outputs belong. What a fallback to the vendor's kernels would cost where channels are
    not put in order before."""
    last = torch.channels_last
    steps = []
    for node in layer.kernel.descriptor.nodes:
        read = [c for segment in node.segments for c in segment.channels.to_list()]
        outputs = node.out_channels.to_list()
        weight = layer.weight[outputs][:, read].contiguous(memory_format=last)
        lists = (torch.tensor(list, device=layer.x.device) for list in (read, outputs))
        steps.append((*lists, weight, layer.bias[outputs]))
    pixels, result = (x.permute(0, 2, 3, 1) for x in (layer.x, layer.out))
    added = None if layer.residual is None else layer.residual.permute(0, 2, 3, 1)

    def run() -> Tensor:
        for read, outputs, weight, bias in steps:
            packed = pixels.index_select(3, read).permute(0, 3, 1, 2)
            residual = None
            if added is not None:
                residual = added.index_select(3, outputs).permute(0, 3, 1, 2)
            out = vendor_layer(layer.shape, packed, weight, bias, residual)
            result.index_copy_(3, outputs, out.permute(0, 2, 3, 1))
        return layer.out

    return run


def warm(jobs: tuple[list[tuple[int, ...]], str]) -> None:
    """Fills Triton's cache with the kernels of these tiles."""
    tiles, dtype = jobs
    for m, n, k, warps, stages in tiles:
        for kernel in (1, 3):
            for outputs in (64, 256):
                layer = make_layer(ConvShape(outputs, 128, kernel, 1, 8), 1, 0.1, DTYPES[dtype])
                for g in LISTED:
                    try:
                        run_with(layer, Tile(m, n, k, g, warps, stages))
                    except Exception as error:  # noqa: BLE001 - reported where it is measured
                        print(m, n, k, g, warps, stages, type(error).__name__, file=sys.stderr)


def measure(shape: ConvShape, batch: int, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    layer = make_layer(shape, batch, args.density, DTYPES[args.dtype])
    exact = exact_result(layer)
    times: dict[str, float] = {}
    worst = 0.0
    ways: dict[str, Callable[[], Tensor]] = {
        str(tile): partial(run_with, layer, tile) for tile in tiles_for(layer)
    }
    if args.sm90_alone:
        ways = {}  # of Triton's, only what it chooses
    ways |= {f"sm90 {tile}": partial(run_sm90, layer, tile) for tile in sm90_tiles(layer)}
    product = dense_product(layer)
    if product is not None:
        ways[CUBLAS] = product
    ways["cudnn, packed"] = cudnn_packed(layer)
    for tile, way in ways.items():
        layer.out.fill_(float("nan"))
        try:
            way()
            error = float((layer.out.float() - exact).norm() / exact.norm())
            if not error < 2e-2:
                print(f"WRONG: {shape} batch {batch} tile {tile}: {error}")
                continue
            worst = max(worst, error)
            times[tile] = median_ms(way)
        except Exception as error:  # noqa: BLE001 - a tile may not fit this GPU; the row says so
            print(f"{shape} batch {batch} tile {tile}: {type(error).__name__} {error}"[:200])
    chosen = layer.kernel._prepared.choose(  # type: ignore[attr-defined]
        batch * shape.out_size**2, layer.x.device
    )
    chosen_ms = median_ms(lambda: run_with(layer, chosen))
    dense_ms = median_ms(lambda: F.conv2d(layer.x, layer.weight, None, shape.stride, shape.padding))
    fused_ms = median_ms(lambda: dense_fused(layer))
    weights = layer.kernel.packed_weight[: layer.kernel._prepared.num_weights]  # type: ignore[attr-defined]
    moved = [layer.x, layer.out, weights]
    moved += [] if layer.residual is None else [layer.residual]
    packed_ms = times.pop("cudnn, packed", float("nan"))
    best = min(times, key=lambda t: times[t]) if times else "none"
    return {
        "shape": asdict(shape),
        "batch": batch,
        "best_tile": best,
        "best_ms": times.get(best, float("nan")),
        "chosen_tile": str(chosen),
        "chosen_ms": chosen_ms,
        "cudnn_conv_ms": dense_ms,
        "cudnn_fused_ms": fused_ms,
        "cudnn_packed_ms": packed_ms,
        "cublas_ms": times.get(CUBLAS, float("nan")),
        "key": tuple(layer.kernel._prepared.key),  # type: ignore[attr-defined]
        "copy_bound_ms": sum(t.nbytes for t in moved) / rate / 1e6,
        "relative_error": worst,
        "times_ms": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--sm90-alone", action="store_true", help="no tiles of Triton's kernel")
    parser.add_argument("--linears", action="store_true", help="DeiT-small's layers, too")
    parser.add_argument("--kernels", default="1,3", help="widths of the windows")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--json")
    args = parser.parse_args()
    parts = [(list(CANDIDATES[i :: args.processes]), args.dtype) for i in range(args.processes)]
    if not args.sm90_alone:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            pool.map(warm, parts)
    torch.backends.cudnn.benchmark = True
    rate = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}, copy {rate:.0f} GB/s")
    rows = []
    for batch in (int(b) for b in args.batches.split(",")):
        for shape in (*resnet50_shapes(), *(deit_small_shapes() if args.linears else ())):
            if str(shape.kernel) not in args.kernels.split(","):
                continue
            row = measure(shape, batch, args, rate)
            rows.append(row)
            print(
                f"{batch:4d} {shape!s:28s} best {row['best_ms']:.4f} ({row['best_tile']})  chosen "
                f"{row['chosen_ms']:.4f}  cudnn {row['cudnn_conv_ms']:.4f}, fused "
                f"{row['cudnn_fused_ms']:.4f}, packed {row['cudnn_packed_ms']:.4f}, "
                f"cublas {row['cublas_ms']:.4f}  copy {row['copy_bound_ms']:.4f}"
            )
            if args.json:  # after every row: a limit of time, or a tile that hangs, ends this
                content = {"machine": describe_gpu(), "copy_gb_s": rate, "rows": rows}
                with open(args.json, "w") as file:
                    json.dump(content, file)


if __name__ == "__main__":
    main()
