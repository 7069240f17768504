"""The command `disco`: a thin face of the framework. See `disco --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from disco import commands, running
from disco.bench.throughput import BF16_ENGINES, DENSE_ENGINES, DTYPES
from disco.errors import InputError, TransportError
from disco.program.message_layout import WIRE_DTYPES
from disco.runtime.children import WorkerError
from disco.runtime.joined import MEETING_S
from disco.runtime.keys import DAYS
from disco.runtime.mpi import abort_job
from disco.runtime.survival import ON_PEER_LOSS
from disco.runtime.tcp.transport import SILENCE_S
from disco.runtime.transports import TRANSPORTS
from disco.sparsify import GROUP_SIZES
from disco.stream_report import MOST_PROFILED
from disco_kernels import WINOGRAD, BackendUnavailable

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130

_EXAMPLES = """\
example:
  disco partition resnet50 --nodes 2 --density 0.2 --out out/
  disco inspect out/
  disco run out/ --input photo.jpg
  disco verify out/ --input photos/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 if the work failed or a comparison did; 2 for a mistake in what was given, after one
        line on stderr; 130 if interrupted.
    """
    try:
        args = _parser().parse_args(argv)
        if args.handler is None:
            _parser().print_help()
            return 0
        # As Ctrl-C: the `with` blocks end the processes and remove temporary files.
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return _run(args)
        finally:
            signal.signal(signal.SIGTERM, previous)
    except KeyboardInterrupt:
        print("disco: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _run(args: argparse.Namespace) -> int:
    try:
        return EXIT_FAILED if args.handler(args) is False else 0
    except (InputError, BackendUnavailable) as error:
        return _fail(error, EXIT_INPUT)
    except (WorkerError, TransportError) as error:
        return _fail(error, EXIT_FAILED)


def _fail(error: Exception, code: int) -> int:
    print(f"disco: error: {' '.join(str(error).split())}", file=sys.stderr)
    abort_job(code)
    return code


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _version() -> str:
    try:
        return metadata.version("disco-kernels")
    except metadata.PackageNotFoundError:
        return "(run from its sources, not installed)"


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as all errors of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"disco: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="disco",
        description="Split a vision model over several small devices, run and check it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"disco {_version()}")
    parser.set_defaults(handler=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    _add_demo(subparsers)
    _add_partition(subparsers)
    _add_inspect(subparsers)
    _add_calibrate(subparsers)
    _add_run(subparsers)
    _add_worker(subparsers)
    _add_doctor(subparsers)
    _add_token_command(subparsers)
    _add_keys(subparsers)
    _add_verify(subparsers)
    _add_bench(subparsers)
    _add_lab(subparsers)
    return parser


def _add_demo(subparsers: Any) -> None:
    demo = subparsers.add_parser(
        "demo",
        help="make, cut, run and measure ResNet-50 on a photograph",
        description="Give ResNet-50 DISCO structure, cut it into shards, run them in processes of "
        "their own on a photograph, compare with the whole model, and measure.",
    )
    _add_model_options(demo, positional=False)
    demo.add_argument("--image", type=Path, metavar="FILE", help="photograph to classify")
    demo.add_argument("--density", type=float, default=0.2, help="default: %(default)s")
    demo.add_argument("--rounds", type=int, default=8, help="of measuring (default: %(default)s)")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="keep shards and weights there")
    _add_json(demo)
    demo.set_defaults(handler=commands.demo)


def _add_partition(subparsers: Any) -> None:
    partition = subparsers.add_parser(
        "partition",
        help="cut a model into one shard per node",
        description="Cut a model into one shard per node. The zeros in its weights decide what is "
        "exchanged; --density makes such zeros first, by magnitude, without training.",
        epilog="example:\n  disco partition resnet50 --nodes 2 --density 0.2 --out out/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(partition, positional=True)
    partition.add_argument(
        "--density", type=float, help="of exchanged channels; without it the weights stay"
    )
    partition.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=1,
        help="neighbours among the channels that --density keeps or drops together (default: 1)",
    )
    partition.add_argument(
        "--pattern",
        type=Path,
        metavar="FILE",
        help="recorded pattern (default: WEIGHTS.pattern.json if that exists)",
    )
    partition.add_argument(
        "--dynamic-size",
        action="store_true",
        help="let height and width of images differ from --image-size, where the model can",
    )
    partition.add_argument(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        help="what nodes send each other travels in this where it is fewer bytes (default: as the "
        "model computes; `disco calibrate` measures what the others cost)",
    )
    partition.add_argument(
        "--survivable",
        action="store_true",
        help="let any of the nodes answer without the others (`disco run --on-peer-loss degrade`)",
    )
    partition.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    partition.add_argument("--overwrite", action="store_true", help="replace an old partition")
    partition.set_defaults(handler=commands.partition)


def _add_inspect(subparsers: Any) -> None:
    inspect = subparsers.add_parser(
        "inspect",
        help="print the plan of a partition, and draw its exchange",
        description="Print a row a layer: who owns and computes what, what is selected, sent and "
        "computed. --draw draws a matrix an exchanged tensor: rows receive, columns send.",
        epilog="example:\n  disco inspect out/ --json plan.json --draw plan.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("directory", type=Path, help="made by `disco partition`")
    inspect.add_argument(
        "--draw", type=Path, metavar="FILE", help=".png or .svg (needs the extra `plot`)"
    )
    _add_json(inspect)
    inspect.set_defaults(handler=commands.inspect)


def _add_calibrate(subparsers: Any) -> None:
    calibrate = subparsers.add_parser(
        "calibrate",
        help="find the smallest wire dtype that is exact enough on your own images",
        description="Run all nodes of a partition in this process with payloads in every wire "
        "dtype, compare with payloads as they are, and name the smallest one that will do. --out "
        "writes the same shards with it; the model is not needed. Exit code 1 if none will do.",
        epilog="example:\n  disco calibrate out/ --input photos/ --max-error 0.01 --out narrow/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("directory", type=Path, help="made by `disco partition`")
    calibrate.add_argument("--input", type=Path, required=True, help="an image, or a folder")
    calibrate.add_argument(
        "--max-error",
        type=float,
        default=0.01,
        help="allowed difference, as a part of the largest output (default: %(default)s)",
    )
    calibrate.add_argument(
        "--image-size",
        type=int,
        help="of a partition made with --dynamic-size (default: the one it was made with)",
    )
    calibrate.add_argument("--out", type=Path, metavar="DIR", help="write the chosen one there")
    calibrate.add_argument("--overwrite", action="store_true", help="replace an old partition")
    _add_json(calibrate)
    calibrate.set_defaults(handler=commands.calibrate)


def _add_run(subparsers: Any) -> None:
    run = subparsers.add_parser(
        "run",
        help="classify images on all nodes",
        description="Without --peers: one process per node on this machine, over loopback. With "
        "--peers and --rank, under torchrun (-m disco.run) or under mpiexec: this process is one "
        "rank. The leader reads the images and sends them to the others.",
        epilog="examples:\n  disco run out/ --input photos/\n"
        "  disco run out/ --peers peers.yaml --rank 0 --token-file token --input photos/\n"
        "  mpiexec -n 2 disco run out/ --input photos/\n"
        "  disco run out/ --input photos/ --in-flight 2 --profile trace.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("directory", type=Path, help="made by `disco partition`")
    run.add_argument("--input", type=Path, help="an image, or a folder of them (of the leader)")
    run.add_argument("--nodes", type=int, help="must be the plan's number (default: that)")
    run.add_argument(
        "--image-size",
        type=int,
        help="of a partition made with --dynamic-size (default: the one it was made with)",
    )
    run.add_argument(
        "--in-flight",
        type=int,
        default=1,
        metavar="N",
        help="images under way at a time: while one waits for payloads another one is computed, "
        "which gives more images a second and a longer latency of each (default: %(default)s)",
    )
    run.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help=f"write where the time of the first {MOST_PROFILED} images went: .json for Perfetto "
        "(ui.perfetto.dev) and chrome://tracing, .png for a picture (needs the extra `plot`)",
    )
    run.add_argument("--top", type=int, default=5, help="classes to show (default: %(default)s)")
    _add_member_options(run)
    _add_json(run)
    run.set_defaults(handler=running.run)


def _add_worker(subparsers: Any) -> None:
    worker = subparsers.add_parser(
        "worker",
        help="be one rank of a cluster, led by another",
        description="Load one shard, meet the peers, and take part in what the leader runs until "
        "it ends.",
        epilog="example:\n  disco worker out/ --peers peers.yaml --rank 1 --token-file token",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    worker.add_argument("directory", type=Path, help="with the manifest and this rank's shard")
    _add_member_options(worker)
    worker.set_defaults(handler=running.worker)


def _add_member_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, metavar="FILE", help="YAML with HOST:PORT of each")
    parser.add_argument("--rank", type=int, help="of this node in --peers")
    parser.add_argument(
        "--leader", type=int, default=0, help="the rank that has the inputs (default: %(default)s)"
    )
    _add_token(parser)
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=SILENCE_S,
        metavar="S",
        help="tcp: a peer that is silent for so long is lost (default: %(default)s)",
    )
    parser.add_argument(
        "--on-peer-loss",
        choices=ON_PEER_LOSS,
        default="fail",
        help="tcp: end, or let the others go on from the channels that they own, until the node is "
        "back (needs `disco partition --survivable`; default: %(default)s)",
    )
    parser.add_argument(
        "--meeting",
        type=float,
        default=MEETING_S,
        metavar="S",
        help="how long to wait for all ranks at the start (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="of each process (default: here the cores shared out evenly; as a member, torch's)",
    )


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the secret that all ranks share (default: the variable DISCO_TOKEN)",
    )
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="tcp: encrypt, with this rank's folder of `disco keys`; for all ranks or none",
    )


def _add_doctor(subparsers: Any) -> None:
    doctor = subparsers.add_parser(
        "doctor",
        help="say which nodes cannot talk, and why",
        description="Run it on all nodes at once: each pair is tried as a run would use it, token "
        "included. Exit code 1 if a pair cannot talk.",
        epilog="example:\n  disco doctor --peers peers.yaml --rank 1 --token-file token",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--peers", type=Path, required=True, metavar="FILE", help="as for run")
    doctor.add_argument("--rank", type=int, required=True, help="of this node")
    _add_token(doctor)
    doctor.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="how long to try (default: %(default)s)",
    )
    _add_json(doctor)
    doctor.set_defaults(handler=running.doctor)


def _add_token_command(subparsers: Any) -> None:
    token = subparsers.add_parser(
        "token",
        help="make the secret that all ranks share",
        description="Write 256 random bits into a new file that only this user reads. Copy it to "
        "every node.",
    )
    token.add_argument("file", type=Path, help="must not exist")
    token.set_defaults(handler=running.token)


def _add_keys(subparsers: Any) -> None:
    keys = subparsers.add_parser(
        "keys",
        help="make the certificates and keys that ranks encrypt with",
        description="Make a certificate authority of the cluster's own, and a certificate and key "
        "a rank: ca.pem, cert.pem and key.pem in DIR/rank-<r>, for the node of rank r and its "
        "--tls. DIR/ca-key.pem stays here. Needs the extra `tls`; the nodes do not.",
        epilog="example:\n  disco keys keys/ --peers peers.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    keys.add_argument("directory", type=Path, metavar="DIR", help="a new one")
    keys.add_argument("--peers", type=Path, required=True, metavar="FILE", help="as for run")
    keys.add_argument(
        "--days", type=int, default=DAYS, help="that they are valid (default: %(default)s)"
    )
    keys.add_argument("--overwrite", action="store_true", help="replace old keys")
    keys.set_defaults(handler=running.keys)


def _add_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="compare the nodes' outputs with the whole model's on your own images",
        description="Exit code 0 if every output is equal up to rounding, 1 if not.",
    )
    _add_cluster_options(verify)
    verify.add_argument(
        "--weights", type=Path, metavar="FILE", help="the file that the model was made from"
    )
    verify.add_argument(
        "--max-error",
        type=float,
        help="allowed difference, as a part of the largest output (default: rounding; needed where "
        "payloads travel in a narrow dtype)",
    )
    _add_json(verify)
    verify.set_defaults(handler=commands.verify)


def _add_bench(subparsers: Any) -> None:
    bench = subparsers.add_parser("bench", help="measure against the best dense engines")
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    throughput = kinds.add_parser(
        "throughput",
        help="whole models on this machine",
        description="Time a compiled DISCO model and the dense model in torch (eager in both "
        "layouts, compiled), ONNX Runtime and OpenVINO, each in a process of its own, in turns. "
        "Exit code 1 if an output is wrong or nothing was skipped.",
        epilog="example:\n  disco bench throughput --model resnet50 --threads 1 --batch 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(throughput, positional=False)
    throughput.add_argument("--density", type=float, default=0.2, help="default: %(default)s")
    throughput.add_argument("--threads", type=int, default=1, help="of every engine (default: 1)")
    throughput.add_argument("--batch", type=int, default=1, help="images a pass (default: 1)")
    throughput.add_argument(
        "--rounds", type=int, default=10, help="of 3 timed passes an engine (default: %(default)s)"
    )
    throughput.add_argument(
        "--engines",
        metavar="A,B,C",
        help=f"of {','.join(DENSE_ENGINES)}; in bfloat16 {','.join(BF16_ENGINES)} (default: all "
        "installed)",
    )
    throughput.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)"
    )
    _add_json(throughput)
    throughput.set_defaults(handler=commands.throughput)
    _add_bench_cluster(kinds)


def _add_lab(subparsers: Any) -> None:
    lab = subparsers.add_parser(
        "lab",
        help="run a command on nodes of this machine, over links of a stated rate",
        description="Make nodes out of network namespaces, with links of a stated rate and a core\n"
        "each, and run COMMAND once a node. {rank} and {address} in its words are replaced.\n"
        "It finds DISCO_LAB_RANK, DISCO_LAB_NODES, DISCO_LAB_ADDRESSES (comma separated) and\n"
        "DISCO_LAB_INTERFACE in its environment. Its lines are printed after [RANK]. Exit code:\n"
        "that of the node that failed first (128 + n for signal n), else 0. Needs root.",
        epilog="examples:\n"
        "  disco lab --nodes 2 --rate 100mbit -- python node.py --rank {rank}\n"
        "  disco lab --nodes 2 --rate 100mbit,10mbit --calibrate --json links.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lab.add_argument("--nodes", type=int, default=2, help="default: %(default)s")
    lab.add_argument(
        "--rate",
        metavar="RATE[,RATE...]",
        help="of every node's link, both ways, or one a node: 100mbit, 1gbit, none (the default)",
    )
    lab.add_argument(
        "--delay", metavar="TIME", help="added one way, such as 1ms; the kernel needs netem"
    )
    lab.add_argument(
        "--cores",
        metavar="LIST",
        help="one core a node, as 0,1, or a range a node, as 0-3,4-7 (default: one a node where "
        "there are enough)",
    )
    lab.add_argument(
        "--calibrate", action="store_true", help="measure latency and bandwidth of every link first"
    )
    lab.add_argument(
        "--keep-going", action="store_true", help="let other nodes go on when one has failed"
    )
    lab.add_argument(
        "--loopback", action="store_true", help="without namespaces and rates; needs no rights"
    )
    lab.add_argument("command", nargs="*", metavar="-- COMMAND", help="with its arguments")
    _add_json(lab)
    lab.set_defaults(handler=commands.lab)


def _add_bench_cluster(kinds: Any) -> None:
    cluster = kinds.add_parser(
        "cluster",
        help="nodes over links of stated rates",
        description="Run DISCO, the dense exchange and the dense model on one node in a network "
        "lab (`disco lab`), one core a node, in turns at every rate. Needs root.",
        epilog="example:\n  disco bench cluster --rates 100mbit,300mbit,1gbit --json FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(cluster, positional=False)
    cluster.add_argument("--density", type=float, default=0.2, help="default: %(default)s")
    cluster.add_argument(
        "--rates",
        default="100mbit,300mbit,1gbit,loopback",
        help="of the links; loopback compares with one node with as many threads (default: "
        "%(default)s)",
    )
    cluster.add_argument(
        "--wire-dtypes", default="float32,float16,int8", help="default: %(default)s"
    )
    cluster.add_argument(
        "--rounds", type=int, default=5, help="of 3 timed passes a system (default: %(default)s)"
    )
    cluster.add_argument(
        "--winograd", choices=WINOGRAD, default="off", help="of the nodes' kernels (default: off)"
    )
    _add_json(cluster)
    cluster.set_defaults(handler=commands.cluster)


def _add_model_options(parser: argparse.ArgumentParser, *, positional: bool) -> None:
    if positional:
        parser.add_argument("model", help="its name in the source, for example resnet50")
    else:
        parser.add_argument("--model", default="resnet50", help="default: %(default)s")
    parser.add_argument("--source", default="torchvision", help="torchvision (default) or timm")
    if positional:
        nodes = parser.add_mutually_exclusive_group()
        # No default: given one, argparse does not see a `--nodes 2` beside a cluster.
        nodes.add_argument("--nodes", type=int, help="so many equal ones (default: 2)")
        nodes.add_argument(
            "--cluster", type=Path, metavar="FILE", help="YAML with speed, memory, link of each"
        )
    else:
        parser.add_argument("--nodes", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help=".safetensors, .pth, .pt (default: random)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="made by `disco partition`")
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of them")
    parser.add_argument("--nodes", type=int, help="must be the plan's number (default: that)")
    parser.add_argument(
        "--threads", type=int, help="of each process (default: the cores shared out evenly)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")


if __name__ == "__main__":
    sys.exit(main())
