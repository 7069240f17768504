"""What the benchmarks of whole models on a GPU share: options, the dense sides, rows, the report.

A dense side is torch eager with batch norms folded into the convolutions, channels last, cuDNN's
choice measured (`cudnn.benchmark`); where ReLUs follow convolutions also the same with cuDNN's
convolutions that have residual and ReLU in them; and with ``--max-autotune`` `torch.compile(mode=
"max-autotune-no-cudagraphs")` of the first. A row's baseline is the fastest of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import disco
from benchmarks.cuda_time import as_graph, describe_gpu, replay_ms
from benchmarks.fused_dense import fuse_convolutions
from disco.zoo import build_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NODES = 2
_CHECKED_IMAGES = 4  # of a batch, against float64

Side = Callable[[Tensor], Tensor]


def parser_of(description: str, batches: str) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--source", default="torchvision")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", default=batches)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--group-size", type=int, default=8, help="channels chosen at a time")
    parser.add_argument("--order", action="store_true", help="channels put into runs afterwards")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products in float32")
    parser.add_argument("--max-autotune", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json")
    return parser


def set_precision(args: argparse.Namespace) -> None:
    """What float32 products may be, and cuDNN's choice by measuring."""
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True


def example_of(args: argparse.Namespace) -> tuple[Tensor]:
    return (torch.randn(2, 3, args.image_size, args.image_size),)


def sparse_model(args: argparse.Namespace) -> nn.Module:
    """The model with the pattern of the options, in float32 on the CPU."""
    model = build_model(args.source, args.model)
    grouped = {} if args.group_size == 1 else {"group_size": args.group_size}
    disco.sparsify_(model, NODES, args.density, example_of(args), **grouped)
    if args.order:
        print(disco.order_channels_(model, NODES, example_of(args), group_size=read_groups(args)))
    return model


def read_groups(args: argparse.Namespace) -> int:
    """Channels that are read at once: 16 bytes of them, if they were put into runs."""
    return 16 // DTYPES[args.dtype].itemsize if args.order else 1


def image_batch(args: argparse.Namespace, batch: int) -> Tensor:
    """Images on the GPU, channels last, in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, args.image_size, args.image_size, generator=generator).cuda()
    return x.to(memory_format=torch.channels_last)


def dense_sides(model: nn.Module, args: argparse.Namespace) -> dict[str, Side]:
    """By name, of a model in float32 on the GPU; they take images in float32."""
    dtype = DTYPES[args.dtype]
    dense = fold_batch_norms(copy.deepcopy(model)).to(dtype).to(memory_format=torch.channels_last)
    sides: dict[str, Side] = {"eager": lambda x: dense(x.to(dtype))}
    fused = fuse_convolutions(dense)
    if fused is not None:
        sides["cudnn_fused"] = lambda x: fused(x.to(dtype))
    if args.max_autotune:
        tuned = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
        sides["max_autotune"] = lambda x: tuned(x.to(dtype))
    return sides


def exact_model(model: nn.Module) -> nn.Module:
    """The oracle: the same in float64."""
    return copy.deepcopy(model).double().to(memory_format=torch.channels_last)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Every batch norm behind a convolution, by torch's own tracer where it can, else as it is."""
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # noqa: BLE001 - a model that cannot be traced has none, or keeps them
        print(f"batch norms stay: {type(error).__name__}")
        return model
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = modules.get(source.target) if source.op == "call_module" else None
        if isinstance(before, nn.Conv2d) and len(source.users) == 1:
            owner, _, name = source.target.rpartition(".")
            setattr(
                modules[owner] if owner else traced,
                name,
                fuse_conv_bn_eval(before, modules[node.target]),
            )
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
            modules = dict(traced.named_modules())
    traced.recompile()
    return traced


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Of as many images as there are of `exact`."""
    return float((y[: len(exact)].double() - exact).norm() / exact.norm())


def exact_of(oracle: nn.Module, x: Tensor) -> Tensor:
    """The oracle's outputs for the first images of a batch."""
    with torch.no_grad():
        return oracle(x[:_CHECKED_IMAGES].double())


def measure(
    x: Tensor, ours: str, sides: Mapping[str, Side], rounds: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A row: medians of CUDA graphs' replays in turns. And what each side computed.

    Args:
        ours: the side that is compared with the fastest of the others, but for those whose names
            begin like its own.
    """
    captured = {name: _capture(run, x) for name, run in sides.items()}
    times = replay_ms([graph for graph, _ in captured.values()], rounds)
    medians = {name: statistics.median(t) for name, t in zip(captured, times, strict=True)}
    dense = min((name for name in sides if not name.startswith(ours)), key=lambda n: medians[n])
    row = {
        "batch": len(x),
        "ms": medians,
        "spread_ms": {n: (min(t), max(t)) for n, t in zip(captured, times, strict=True)},
        "baseline": dense,
        "ratio": medians[dense] / medians[ours],
        "images_per_s": len(x) / medians[ours] * 1e3,
    }
    return row, {name: y for name, (_, y) in captured.items()}


def _capture(run: Side, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one pass, and where it leaves its output."""
    kept: list[Tensor] = []

    def once() -> None:
        kept[:] = [run(x)]

    with torch.no_grad():
        graph = as_graph(once)
    return graph, kept[0]


def print_row(args: argparse.Namespace, row: Mapping[str, Any]) -> None:
    errors = row["relative_error"]
    times = ", ".join(
        f"{name} {ms:.3f} ms" + (f" (error {errors[name]:.2g})" if name in errors else "")
        for name, ms in row["ms"].items()
    )
    print(
        f"{args.model} {args.dtype}{' tf32' if args.tf32 else ''} batch {row['batch']}: {times}; "
        f"{row['ratio']:.2f} times the speed of {row['baseline']}"
    )


def write_report(
    args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **more: object
) -> None:
    """To the file of ``--json``, if one was given."""
    if args.json:
        kept = {name: value for name, value in vars(args).items() if name != "json"}
        content = {"machine": describe_gpu(), "arguments": kept, "rows": list(rows), **more}
        with open(args.json, "w") as file:
            json.dump(content, file)
