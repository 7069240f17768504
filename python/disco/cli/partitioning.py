"""The commands that make and look at partitions: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disco import commands
from disco.cli.options import add_cluster_options, add_json, add_model_options
from disco.program.message_layout import WIRE_DTYPES
from disco.sparsify import GROUP_SIZES


def add_demo(subparsers: Any) -> None:
    demo = subparsers.add_parser(
        "demo",
        help="make, cut, run and measure ResNet-50 on a photograph",
        description="Give ResNet-50 DISCO structure, cut it into shards, run them in processes of "
        "their own on a photograph, compare with the whole model, and measure.",
    )
    add_model_options(demo, positional=False)
    demo.add_argument("--image", type=Path, metavar="FILE", help="photograph to classify")
    demo.add_argument("--density", type=float, default=0.2, help="default: %(default)s")
    demo.add_argument("--rounds", type=int, default=8, help="of measuring (default: %(default)s)")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="keep shards and weights there")
    add_json(demo)
    demo.set_defaults(handler=commands.demo)


def add_partition(subparsers: Any) -> None:
    partition = subparsers.add_parser(
        "partition",
        help="cut a model into one shard per node",
        description="Cut a model into one shard per node. The zeros in its weights decide what is "
        "exchanged; --density makes such zeros first, by magnitude, without training.",
        epilog="examples:\n  disco partition resnet50 --nodes 2 --density 0.2 --out out/\n"
        "  disco partition runs/x --out out/    (what `disco train` made)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(partition, positional=True)
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


def add_inspect(subparsers: Any) -> None:
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
    add_json(inspect)
    inspect.set_defaults(handler=commands.inspect)


def add_calibrate(subparsers: Any) -> None:
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
    add_json(calibrate)
    calibrate.set_defaults(handler=commands.calibrate)


def add_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="compare the nodes' outputs with the whole model's on your own images",
        description="Exit code 0 if every output is equal up to rounding, 1 if not.",
    )
    add_cluster_options(verify)
    verify.add_argument(
        "--weights", type=Path, metavar="FILE", help="the file that the model was made from"
    )
    verify.add_argument(
        "--max-error",
        type=float,
        help="allowed difference, as a part of the largest output (default: rounding; needed where "
        "payloads travel in a narrow dtype)",
    )
    add_json(verify)
    verify.set_defaults(handler=commands.verify)
