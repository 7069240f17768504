"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool) -> None:
    """Which model: as an argument, or as --model."""
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


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Which partition, and how many processes."""
    parser.add_argument("directory", type=Path, help="made by `disco partition`")
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of them")
    parser.add_argument("--nodes", type=int, help="must be the plan's number (default: that)")
    parser.add_argument(
        "--threads", type=int, help="of each process (default: the cores shared out evenly)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Where the result goes, too."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")


def add_token(parser: argparse.ArgumentParser) -> None:
    """Where the secret is."""
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
