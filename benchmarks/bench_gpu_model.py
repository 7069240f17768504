"""A whole model on a GPU: `disco.compile` against the dense model, both replayed as CUDA graphs.

    python -m benchmarks.bench_gpu_model --model resnet50 --batches 1,32,128 --json FILE

The dense sides: torch eager with batch norms folded into the convolutions, channels last, cuDNN's
choice measured (`cudnn.benchmark`), and with ``--max-autotune`` also `torch.compile(mode=
"max-autotune-no-cudagraphs")` of the same. A row's baseline is the faster of them. Outputs are
compared with the dense model in float64 on the same input, and the error of the dense side with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import disco
from benchmarks.cuda_time import as_graph, describe_gpu, replay_ms
from disco.zoo import build_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
    return float((y.double() - exact).norm() / exact.norm())


def capture_of(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one pass, and where it leaves its output."""
    kept: list[Tensor] = []

    def once() -> None:
        kept[:] = [run(x)]

    with torch.no_grad():
        graph = as_graph(once)
    return graph, kept[0]


def measure(
    batch: int,
    args: argparse.Namespace,
    sides: dict[str, Callable[[Tensor], Tensor]],
    exact: nn.Module,
) -> dict[str, Any]:
    """One row."""
    size = args.image_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator).cuda()
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        head = x[: min(batch, 4)]
        wanted = exact(head.double())
    captured = {name: capture_of(run, x) for name, run in sides.items()}
    times = replay_ms([graph for graph, _ in captured.values()], args.rounds)
    medians = {name: statistics.median(t) for name, t in zip(captured, times, strict=True)}
    errors = {name: relative_error(y[: len(head)], wanted) for name, (_, y) in captured.items()}
    dense = min((name for name in sides if name != "disco"), key=lambda n: medians[n])
    return {
        "batch": batch,
        "ms": medians,
        "spread_ms": {n: (min(t), max(t)) for n, t in zip(captured, times, strict=True)},
        "relative_error": errors,
        "baseline": dense,
        "ratio": medians[dense] / medians["disco"],
        "images_per_s": batch / medians["disco"] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="torchvision")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products in float32")
    parser.add_argument("--max-autotune", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True
    dtype = DTYPES[args.dtype]

    model = build_model(args.source, args.model)
    example = (torch.randn(2, 3, args.image_size, args.image_size),)
    grouped = {} if args.group_size == 1 else {"group_size": args.group_size}
    disco.sparsify_(model, 2, args.density, example, **grouped)
    ours = disco.compile(model.cuda(), 2, example_inputs=example, dtype=dtype)
    dense = fold_batch_norms(copy.deepcopy(model)).to(dtype).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": lambda x: dense(x.to(dtype)),
        "disco": ours,
    }
    if args.max_autotune:
        tuned = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
        sides["max_autotune"] = lambda x: tuned(x.to(dtype))
    exact = copy.deepcopy(model).double().to(memory_format=torch.channels_last)
    rows = []
    for batch in (int(b) for b in args.batches.split(",")):
        row = measure(batch, args, sides, exact)
        rows.append(row)
        print(
            f"{args.model} {args.dtype}{' tf32' if args.tf32 else ''} batch {batch}: "
            + ", ".join(
                f"{n} {t:.3f} ms (error {row['relative_error'][n]:.2g})"
                for n, t in row["ms"].items()
            )
            + f"; {row['ratio']:.2f} times the speed of {row['baseline']}"
        )
    if args.json:
        kept = {name: value for name, value in vars(args).items() if name != "json"}
        content = {"machine": describe_gpu(), "arguments": kept, "rows": rows}
        content["kernels"] = ours.kernel_backends
        with open(args.json, "w") as file:
            json.dump(content, file)


if __name__ == "__main__":
    main()
