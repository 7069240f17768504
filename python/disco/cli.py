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

from disco import commands
from disco.bench.throughput import BF16_ENGINES, DENSE_ENGINES, DTYPES
from disco.errors import InputError, TransportError
from disco.runtime.children import WorkerError
from disco.sparsify import GROUP_SIZES
from disco_kernels import BackendUnavailable

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
    _add_run(subparsers)
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


def _add_run(subparsers: Any) -> None:
    run = subparsers.add_parser("run", help="classify images, one process per node, over loopback")
    _add_cluster_options(run)
    run.add_argument(
        "--image-size",
        type=int,
        help="of a partition made with --dynamic-size (default: the one it was made with)",
    )
    run.add_argument("--top", type=int, default=5, help="classes to show (default: %(default)s)")
    _add_json(run)
    run.set_defaults(handler=commands.run)


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
