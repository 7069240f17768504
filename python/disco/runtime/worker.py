"""One rank in a process of its own, as `RankProcesses` starts it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from disco.executor import Executor
from disco.partition.shards import load_shard
from disco.runtime.gloo import GlooTransport
from disco.runtime.messages import Message
from disco.runtime.passes import Passes
from disco.runtime.rendezvous import agree, file_store
from disco.runtime.serve import Handlers, serve

# Ranks do not finish loading at once. A launcher notices a dead one long before.
_MEETING_TIMEOUT_S = 150.0


def prepare(args: argparse.Namespace) -> tuple[Message, Handlers]:
    """Load this rank's shard and no other, meet the peers, and make the executor."""
    torch.set_num_threads(args.threads)
    shard = load_shard(args.directory, args.rank)
    weight_bytes = sum(tensor.nbytes for tensor in shard.weights.values())
    store = file_store(args.rendezvous, args.world_size)
    agree(store, args.rank, args.world_size, shard.plan_digest, _MEETING_TIMEOUT_S)
    transport = GlooTransport(args.rank, args.world_size, store, timeout_s=args.timeout_s)
    transport.connect()
    executor = Executor(shard.program, shard.weights, transport, deadline_s=args.timeout_s)
    passes = Passes(
        executor,
        os.path.join(os.path.dirname(args.rendezvous), f"outputs-{args.rank}.safetensors"),
        lambda: {
            "bytes_sent": transport.bytes_sent,
            "bytes_received": transport.bytes_received,
        },
    )
    ready: Message = {
        "rank": args.rank,
        "weight_bytes": weight_bytes,
        "threads": args.threads,
        "transport": "gloo",
        "backends": sorted(set(executor.kernel_backends.values())),
    }
    return ready, passes.handlers()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin ends. See `disco.runtime.serve` for the exit codes."""
    parser = argparse.ArgumentParser(prog="python -m disco.runtime.worker", description=__doc__)
    parser.add_argument("--directory", required=True, help="the folder with the manifest and shard")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--rendezvous", required=True, help="a file in a private folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="for every wait on a peer")
    args = parser.parse_args(argv)
    return serve(lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
