"""The commands that measure: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disco import commands
from disco.bench.throughput import BF16_ENGINES, DENSE_ENGINES, DTYPES
from disco.cli.options import add_json, add_model_options
from disco.training_commands import accuracy_command
from disco_kernels import WINOGRAD


def add_bench(subparsers: Any) -> None:
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
    add_model_options(throughput, positional=False)
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
    add_json(throughput)
    throughput.set_defaults(handler=commands.throughput)
    _add_bench_cluster(kinds)
    _add_bench_accuracy(kinds)


def _add_bench_accuracy(kinds: Any) -> None:
    accuracy = kinds.add_parser(
        "accuracy",
        help="train methods and baselines, and compare their metrics and bytes",
        description="Train every method of every study with several seeds, each on one thread, "
        "and print the metric against the bytes exchanged. What FILE has is "
        "not trained again, and an interrupted cell goes on after its last epoch.",
        epilog="examples:\n"
        "  disco bench accuracy --json FILE\n"
        "  disco bench accuracy --json FILE --study digits-resnet --method magnitude --seeds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    accuracy.add_argument("--json", type=Path, required=True, help="results, added to")
    accuracy.add_argument(
        "--runs", type=Path, metavar="DIR", help="of the trainings (default: FILE with .runs)"
    )
    accuracy.add_argument("--plots", type=Path, metavar="DIR", help="draw PNGs into this folder")
    accuracy.add_argument("--study", action="append", default=[], help="may be repeated")
    accuracy.add_argument("--method", action="append", default=[], help="may be repeated")
    accuracy.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    accuracy.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    accuracy.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells side by side, a process and a thread each (default: %(default)s)",
    )
    accuracy.set_defaults(handler=accuracy_command)


def _add_bench_cluster(kinds: Any) -> None:
    cluster = kinds.add_parser(
        "cluster",
        help="nodes over links of stated rates",
        description="Run DISCO, the dense exchange and the dense model on one node in a network "
        "lab (`disco lab`), one core a node, in turns at every rate. Needs root.",
        epilog="example:\n  disco bench cluster --rates 100mbit,300mbit,1gbit --json FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(cluster, positional=False)
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
    add_json(cluster)
    cluster.set_defaults(handler=commands.cluster)


def add_lab(subparsers: Any) -> None:
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
    add_json(lab)
    lab.set_defaults(handler=commands.lab)
