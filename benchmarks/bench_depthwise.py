"""`GroupedConv2d` against torch's own convolution, on the depthwise and grouped layers of networks.

    python -m benchmarks.bench_depthwise --threads 1 --json FILE

prints a row a layer: batch 1, float32 or bfloat16, bias, no activation, all sides in channels-last
memory. Times are medians of rounds in which the sides take turns:

- *disco*: the call as a compiled model makes it, bound to its tensors.
- *torch*: ``F.conv2d``, input and weight in channels-last (oneDNN lays the weight out anew at each
  call).
- *packed*: oneDNN's operator that `torch.compile` uses for frozen weights, laid out once.

Beside them, of disco: *of peak*, its multiply-adds over the measured multiply-add peak of as many
threads; *GB/s*, input, output and weights, each once, over its time (they are in the caches);
*error*, the largest difference from float64 over the largest value. Under pytest-benchmark (``make
bench``) the sides of a layer are a group.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import disco_kernels as dk
from benchmarks.rates import peak_gflops, record, relative_error
from disco.bench.machine import describe_machine
from disco_kernels.backends.cpu import extension_status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One layer of a network at 224 x 224; padding is ``kernel // 2``."""

    network: str
    channels: int
    kernel: int
    stride: int
    size: int
    groups: int = 0  # 0: as many as channels

    def __str__(self) -> str:
        groups = f"g{self.groups}" if self.groups else "dw"
        return (
            f"{self.network} {self.channels}{groups}-k{self.kernel}s{self.stride}"
            f"-{self.size}x{self.size}"
        )

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        per_group = self.channels // (self.groups or self.channels)
        return (self.channels, per_group, self.kernel, self.kernel)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.weight_shape) * self.out_size**2

    def num_bytes(self, dtype: torch.dtype) -> int:
        elements = self.channels * (self.size**2 + self.out_size**2) + math.prod(self.weight_shape)
        return elements * dtype.itemsize


_MOBILENET = (
    *((16, 3, 1, 112), (64, 3, 2, 112), (72, 3, 1, 56), (72, 5, 2, 56), (120, 5, 1, 28)),
    *((240, 3, 2, 28), (200, 3, 1, 14), (480, 3, 1, 14), (672, 3, 1, 14), (672, 5, 2, 14)),
    (960, 5, 1, 7),
)
_EFFICIENTNET = (
    *((32, 3, 1, 112), (96, 3, 2, 112), (144, 3, 1, 56), (144, 5, 2, 56), (240, 5, 1, 28)),
    *((480, 5, 1, 14), (672, 5, 1, 14), (1152, 5, 1, 7), (1152, 3, 1, 7)),
)
_CONVNEXT = ((96, 7, 1, 56), (192, 7, 1, 28), (384, 7, 1, 14), (768, 7, 1, 7))
_RESNEXT = ((128, 3, 1, 56), (256, 3, 2, 56), (256, 3, 1, 28), (512, 3, 1, 14), (1024, 3, 1, 7))
LAYERS = [
    Layer("one pixel: the call alone", 16, 3, 1, 1),
    *(Layer("mobilenet_v3_large", *layer) for layer in _MOBILENET),
    *(Layer("efficientnet_b0", *layer) for layer in _EFFICIENTNET),
    *(Layer("convnext_tiny", *layer) for layer in _CONVNEXT),
    *(Layer("resnext50_32x4d", *layer, groups=32) for layer in _RESNEXT),
]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """What was measured of one layer; times in microseconds (medians)."""

    layer: str
    dtype: str
    threads: int
    disco_us: float
    disco_us_p10: float
    disco_us_p90: float
    torch_us: float
    packed_us: float
    of_peak: float
    gb_per_s: float
    error: float


def sides(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Call], float]:
    """The calls by name, and disco's error. Raises AssertionError if the sides differ."""
    torch.manual_seed(0)
    weight, bias = torch.randn(layer.weight_shape).to(dtype), torch.randn(layer.channels).to(dtype)
    x = torch.randn(1, layer.channels, layer.size, layer.size).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    groups, padding = layer.groups or layer.channels, [layer.kernel // 2] * 2
    stride, dilation = [layer.stride] * 2, [1, 1]

    pair = (layer.stride, layer.stride)
    spec = dk.ConvSpec(layer.weight_shape[2:], pair, (layer.kernel // 2,) * 2)
    kernel = dk.GroupedConv2d(weight, groups, spec, bias=bias, backend="cpu")
    out = kernel(x)
    last = weight.to(memory_format=torch.channels_last)
    arguments = (padding, stride, dilation, groups)
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_convolution_weight(weight, *arguments, list(x.shape))
    calls: dict[str, Call] = {
        "disco": kernel.bind(x, None, out),
        "torch": lambda: F.conv2d(x, last, bias, stride, padding, dilation, groups),
        "packed": lambda: ops._convolution_pointwise(
            x, packed, bias, *arguments, "none", [None], ""
        ),
    }
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    calls["disco"]()
    error = relative_error(out, exact)
    assert error < limit, f"{layer}: {error}"
    for name in ("torch", "packed"):
        assert relative_error(calls[name](), exact) < limit, f"{layer}: {name} is another layer"
    return calls, error


def measure(layer: Layer, dtype: torch.dtype, rounds: int) -> Row:
    """The sides take turns: in each round each runs some calls untimed, then as many timed."""
    calls, error = sides(layer, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    # A fifth of a millisecond a turn, by an estimate of 50 GFLOP/s: long beside the clock.
    repeats = min(100, max(1, int(2e-4 * 50e9 / layer.flops)))
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(repeats):
                call()
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - begin) / repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    low, *_, high = statistics.quantiles(times["disco"], n=10)
    threads = torch.get_num_threads()
    rate = layer.flops / median["disco"] / 1e9
    return Row(
        str(layer),
        str(dtype).removeprefix("torch."),
        threads,
        *(round(1e6 * value, 1) for value in (median["disco"], low, high)),
        round(1e6 * median["torch"], 1),
        round(1e6 * median["packed"], 1),
        round(rate / (peak_gflops() * threads), 3),
        round(layer.num_bytes(dtype) / median["disco"] / 1e9, 1),
        error,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "-m", "benchmarks.bench_depthwise", *sys.argv[1:]])
    machine = {**describe_machine(), "command": command, "isa": extension_status().isa}
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    print(
        f"\n{'layer':42} {'disco us':>9} {'torch us':>9} {'packed us':>9} {'torch/disco':>12} "
        f"{'packed/disco':>13} {'of peak':>8} {'GB/s':>7} {'error':>8}"
    )
    rows = []
    with torch.inference_mode():
        for layer in LAYERS:
            row = measure(layer, DTYPES[options.dtype], options.rounds)
            rows.append(row)
            print(
                f"{row.layer:42} {row.disco_us:9.1f} {row.torch_us:9.1f} {row.packed_us:9.1f} "
                f"{row.torch_us / row.disco_us:12.2f} {row.packed_us / row.disco_us:13.2f} "
                f"{row.of_peak:8.3f} {row.gb_per_s:7.1f} {row.error:8.1e}",
                flush=True,
            )
    if options.json is not None:
        listed = ",\n".join(json.dumps(asdict(row)) for row in rows)
        text = f'{{"machine": {json.dumps(machine)},\n"rows": [\n{listed}\n]}}\n'
        options.json.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("side", ["disco", "torch", "packed"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_depthwise(benchmark: Any, layer: Layer, side: str) -> None:
    benchmark.group = f"depthwise {layer}"
    with torch.inference_mode():
        calls, error = sides(layer, torch.float32)
        benchmark(calls[side])
    record(benchmark, layer.flops, error)


if __name__ == "__main__":
    main()
