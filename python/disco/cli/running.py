"""The commands that run partitions, and what they need: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disco import running
from disco.cli.options import add_json, add_token
from disco.runtime.keys import DAYS
from disco.runtime.places import MEETING_S
from disco.runtime.survival import ON_PEER_LOSS
from disco.runtime.transports import TRANSPORTS
from disco.stream_report import MOST_PROFILED


def add_run(subparsers: Any) -> None:
    run = subparsers.add_parser(
        "run",
        help="run a partition on images, on all nodes",
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
    run.add_argument(
        "--outputs",
        type=Path,
        metavar="DIR",
        help="write each image's answer there, as NAME.safetensors",
    )
    run.add_argument("--top", type=int, default=5, help="classes to show (default: %(default)s)")
    _add_member_options(run)
    add_json(run)
    run.set_defaults(handler=running.run)


def add_worker(subparsers: Any) -> None:
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
    add_token(parser)
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda|cuda:N",
        help="where to compute; with cuda the ranks of a machine take its GPUs in turns (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="S",
        help="tcp: a peer that is silent for so long is lost (default: 2; with --device cuda 30, "
        "since kernels are compiled at the first image)",
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


def add_doctor(subparsers: Any) -> None:
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
    add_token(doctor)
    doctor.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="how long to try (default: %(default)s)",
    )
    add_json(doctor)
    doctor.set_defaults(handler=running.doctor)


def add_token_command(subparsers: Any) -> None:
    token = subparsers.add_parser(
        "token",
        help="make the secret that all ranks share",
        description="Write 256 random bits into a new file that only this user reads. Copy it to "
        "every node.",
    )
    token.add_argument("file", type=Path, help="must not exist")
    token.set_defaults(handler=running.token)


def add_keys(subparsers: Any) -> None:
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
