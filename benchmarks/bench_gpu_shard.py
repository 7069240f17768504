"""One node's shard alone on a GPU against the whole dense model, both replayed as CUDA graphs.

    python -m benchmarks.bench_gpu_shard --model resnet50 --batches 32,128 --json FILE

What is timed is the node's whole program as it runs beside other nodes: its layers over its own
channels and over payloads, and packing what it sends. What is left out is the network: payloads lie
in their buffers already (random, finite, put there once), and messages are packed and go nowhere.
So this is the bound that a cluster of such nodes approaches as its links get faster, not what one
reaches.

The dense sides are those of `benchmarks.gpu_models`. A shard's output for made-up payloads means
nothing, so it is compared with the plain-torch kernels' for the same payloads ("shard", in the same
dtype), and all shards together, run one after the other with real payloads, with the dense model in
float64 ("all shards").
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

import disco
from benchmarks.gpu_models import (
    DTYPES,
    NODES,
    dense_sides,
    exact_model,
    exact_of,
    example_of,
    image_batch,
    measure,
    parser_of,
    print_row,
    relative_error,
    set_precision,
    sparse_model,
    write_report,
)
from benchmarks.no_network import NoNetwork
from disco.executor import Executor, run_together


def cut(model: nn.Module, args: argparse.Namespace) -> disco.Partitioned:
    """The model in the options' dtype, cut for two nodes."""
    dtype = DTYPES[args.dtype]
    (example,) = example_of(args)
    return disco.partition(copy.deepcopy(model).to(dtype), (example.to(dtype),), NODES)


def shard_alone(
    parts: disco.Partitioned, rank: int, device: torch.device, backend: str | None = None
) -> Executor:
    """A rank's program with payloads that are there already."""
    part = parts.ranks[rank]
    transport = NoNetwork(rank, NODES)
    return Executor(part.program, part.weights, transport, backend=backend, device=device)


def main() -> None:
    parser = parser_of(__doc__, batches="32,128")
    parser.add_argument("--rank", type=int, default=0, choices=range(NODES))
    args = parser.parse_args()
    set_precision(args)
    dtype, device = DTYPES[args.dtype], torch.device("cuda", torch.cuda.current_device())
    model = sparse_model(args)
    parts = cut(model, args)
    model.cuda()
    shard = shard_alone(parts, args.rank, device)
    plain = shard_alone(parts, args.rank, device, backend="reference")
    together = [Executor(part.program, part.weights, device=device) for part in parts.ranks]
    sides = {"shard": lambda x: shard(x.to(dtype)), **dense_sides(model, args)}
    oracle = exact_model(model)
    rows = []
    for batch in (int(b) for b in args.batches.split(",")):
        x = image_batch(args, batch)
        row, outputs = measure(x, "shard", sides, args.rounds)
        with torch.no_grad():
            wanted = exact_of(oracle, x)
            all_shards = run_together(together, (x[: len(wanted)].to(dtype),))[args.rank]
            alone = outputs.pop("shard").double()
            plainly = plain(x.to(dtype)).double()
        outputs["all shards"] = all_shards
        errors = {name: relative_error(y, wanted) for name, y in outputs.items()}
        row["relative_error"] = {**errors, "shard": relative_error(alone, plainly)}
        rows.append(row)
        print_row(args, row)
        print(f"  all shards together, against float64: error {errors['all shards']:.2g}")
    flops = parts.plan.flops_per_rank[args.rank] / parts.plan.flops_dense
    print(f"rank {args.rank} of {NODES}: {flops:.3f} of the dense model's FLOPs")
    write_report(
        args,
        rows,
        kernels=shard.kernel_backends,
        flops_of_dense=flops,
        bytes_per_image=parts.plan.bytes_per_image,
        packed_bytes=shard.packed_bytes,
    )


if __name__ == "__main__":
    main()
