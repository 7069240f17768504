"""One rank in a process of its own, as `RankProcesses` starts it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from disco.executor import Executor
from disco.partition.shards import load_manifest, load_shard
from disco.runtime.accounts import Account
from disco.runtime.devices import device_of_rank, free_memory_on, make_current
from disco.runtime.memory_check import check_rank_fits
from disco.runtime.messages import Message
from disco.runtime.passes import Passes
from disco.runtime.serve import Dialogue, Handlers, serve
from disco.runtime.stream import Stream
from disco.runtime.survival import Survivor
from disco.runtime.transports import LOOPBACK, open_local
from disco_kernels import WINOGRAD


def prepare(
    args: argparse.Namespace, at_end: ExitStack, dialogue: Dialogue
) -> tuple[Message, Handlers]:
    """Load this rank's shard and no other, meet the peers, and make the executor.

    Args:
        args: of the command line.
        at_end: gets what to do when the process ends, whatever ended it.
        dialogue: with the launcher.
    """
    torch.set_num_threads(args.threads)
    imported_kb = resident_kb()
    device = device_of_rank(args.device, args.rank)
    make_current(device)
    check_rank_fits(load_manifest(args.directory), args.rank, free_memory_on(device))
    shard = load_shard(args.directory, args.rank)
    weight_bytes = sum(tensor.nbytes for tensor in shard.weights.values())
    transport = open_local(
        args.transport,
        shard,
        args.folder,
        args.host,
        timeout_s=args.timeout_s,
        silence_s=args.silence_s,
        survives=args.degrade,
        device=device,
        nccl=args.nccl,
    )
    at_end.callback(transport.close)
    executor = Executor(
        shard.program,
        shard.weights,
        transport,
        deadline_s=args.timeout_s,
        winograd=args.winograd,
        overlap=args.overlap,
        device=device,
    )
    survivor = Survivor(executor, transport, args.timeout_s) if args.degrade else None
    passes = Passes(
        executor,
        os.path.join(args.folder, f"outputs-{args.rank}.safetensors"),
        lambda: {
            "bytes_sent": transport.bytes_sent,
            "bytes_received": transport.bytes_received,
        },
    )
    ready: Message = {
        "rank": args.rank,
        "weight_bytes": weight_bytes,
        "threads": args.threads,
        "transport": args.transport,
        "device": str(device),
        "backends": sorted(set(executor.kernel_backends.values())),
    }
    stream = Stream(executor, transport, dialogue)

    def memory(command: Message) -> Message:
        return {"imported_kb": imported_kb, "now_kb": resident_kb()}

    def run(command: Message) -> Message:
        executor.profile = True
        try:
            reply = passes.run(command)
        finally:
            executor.profile = False
        record = executor.last_record
        if "refused" not in reply and record is not None:
            begin_ns, end_ns = reply["began_ns"], reply["ended_ns"]
            reply["account"] = Account.of(record, begin_ns, end_ns, False).to_plain()
        return reply

    more: Handlers = {
        "run": run,
        "stream": stream.measure,
        "requests": stream.requests,
        "profile": stream.profile,
        "memory": memory,
    }
    handlers = {**passes.handlers(), **more}
    return ready, handlers if survivor is None else survivor.around(handlers)


def resident_kb() -> int:
    """Resident memory of this process in KB; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except OSError:
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin ends. See `disco.runtime.serve` for the exit codes."""
    parser = argparse.ArgumentParser(prog="python -m disco.runtime.worker", description=__doc__)
    parser.add_argument("--directory", required=True, help="the folder with the manifest and shard")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--folder", required=True, help="private to the ranks and the launcher")
    parser.add_argument("--transport", default="tcp", choices=("tcp", "torch"))
    parser.add_argument("--device", default="cpu", help="to compute on (default: %(default)s)")
    parser.add_argument("--nccl", action="store_true", help="torch: payloads go over NCCL")
    parser.add_argument("--host", default=LOOPBACK, help="to listen on (default: %(default)s)")
    parser.add_argument("--silence-s", type=float, default=2.0, help="of a peer, then it is lost")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--winograd", default="off", choices=WINOGRAD)
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--degrade", action="store_true", help="go on without ranks that are lost")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="for every wait on a peer")
    args = parser.parse_args(argv)
    with ExitStack() as at_end:
        return serve(lambda dialogue: prepare(args, at_end, dialogue))


if __name__ == "__main__":
    sys.exit(main())
