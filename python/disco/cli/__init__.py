"""The command `disco`: a thin face of the framework. See `disco --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from types import FrameType
from typing import NoReturn

from disco.cli.measuring import add_bench, add_lab
from disco.cli.partitioning import (
    add_calibrate,
    add_demo,
    add_inspect,
    add_partition,
    add_verify,
)
from disco.cli.running import add_doctor, add_keys, add_run, add_token_command, add_worker
from disco.cli.training import add_evaluate, add_train
from disco.errors import InputError, TrainingError, TransportError
from disco.runtime.children import WorkerError
from disco.runtime.mpi import abort_job
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
    except (WorkerError, TransportError, TrainingError) as error:
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
        description="Make a vision model for several small devices, split it, run and check it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"disco {_version()}")
    parser.set_defaults(handler=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    add_demo(subparsers)
    add_train(subparsers)
    add_evaluate(subparsers)
    add_partition(subparsers)
    add_inspect(subparsers)
    add_calibrate(subparsers)
    add_run(subparsers)
    add_worker(subparsers)
    add_doctor(subparsers)
    add_token_command(subparsers)
    add_keys(subparsers)
    add_verify(subparsers)
    add_bench(subparsers)
    add_lab(subparsers)
    return parser
