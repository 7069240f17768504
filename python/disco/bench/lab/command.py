"""What `disco lab` does with its arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disco.bench.lab.calibration import Calibration
from disco.bench.lab.cores import parse_cores
from disco.bench.lab.lab import Lab
from disco.bench.lab.launch import Outcome, launch
from disco.bench.lab.loopback import Loopback
from disco.bench.lab.rates import parse_delay
from disco.bench.machine import describe_machine
from disco.errors import InputError


@dataclass(frozen=True)
class LabOptions:
    """The arguments of `disco lab`.

    Attributes:
        nodes: how many.
        rates: one for all or one a node, comma separated; None if not given.
        delay: one way, as `parse_delay` reads it; None if not given.
        cores: as `parse_cores` reads them; None for one a node.
        loopback: run without namespaces.
        keep_going: let the others go on when one fails.
        calibrate: measure first.
        command: to run on each node; may be empty with `calibrate`.
    """

    nodes: int
    rates: str | None
    delay: str | None
    cores: str | None
    loopback: bool
    keep_going: bool
    calibrate: bool
    command: Sequence[str]


@dataclass(frozen=True)
class LabResult:
    """What was measured, and how the commands ended; None for what was not asked for."""

    calibration: Calibration | None
    outcome: Outcome | None

    @property
    def code(self) -> int:
        """Exit code of the node that failed first, else 0."""
        return 0 if self.outcome is None else self.outcome.code

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`: the machine, the calibration, the exit code of each node."""
        return {
            "machine": describe_machine(),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "exit_codes": None if self.outcome is None else list(self.outcome.codes),
        }


def run_lab(options: LabOptions) -> LabResult:
    """Open a lab, calibrate it, run a command on each of its nodes.

    Says on standard error what the lab is and how it ended; the calibration's table goes to
    standard output.

    Raises:
        LabUnavailable: this machine or user cannot have one.
        InputError: arguments that contradict each other.
    """
    if not options.command and not options.calibrate:
        raise InputError(
            "nothing to do: give a command after --, for example "
            "`disco lab --nodes 2 --rate 100mbit -- hostname`, or --calibrate"
        )
    cores = None if options.cores is None else parse_cores(options.cores)
    if options.loopback:
        return _on_loopback(options, cores)
    delay_ms = 0.0 if options.delay is None else parse_delay(options.delay)
    rates = (options.rates or "none").split(",")
    with Lab(
        options.nodes,
        rates[0] if len(rates) == 1 else rates,
        delay_ms=delay_ms,
        cores=cores,
    ) as lab:
        for rank, shape in enumerate(lab.shapes):
            _say(f"node {rank}: {lab.address(rank)}, {shape}")
        _say(lab.cores_note)
        calibration = None
        if options.calibrate:
            calibration = lab.calibrate()
            print(calibration, flush=True)
        return LabResult(calibration, _launch(lab, options))


def _on_loopback(options: LabOptions, cores: list[list[int]] | None) -> LabResult:
    asked = [
        name
        for name, given in (
            ("--rate", options.rates not in (None, "none")),
            ("--delay", options.delay is not None),
            ("--calibrate", options.calibrate),
        )
        if given
    ]
    if asked:
        raise InputError(f"--loopback has no wires for {' and '.join(asked)}: leave either out")
    with Loopback(options.nodes, cores=cores) as lab:
        _say("loopback: no namespaces and no rate; speeds say nothing about a network")
        for rank, address in enumerate(lab.addresses):
            _say(f"node {rank}: {address}")
        _say(lab.cores_note)
        return LabResult(None, _launch(lab, options))


def _launch(lab: Lab | Loopback, options: LabOptions) -> Outcome | None:
    if not options.command:
        return None
    outcome = launch(lab, options.command, keep_going=options.keep_going)
    if outcome.failed is not None:
        others = [str(rank) for rank, code in enumerate(outcome.codes) if code is None]
        ended = f"; ended {', '.join(others)}" if others else ""
        _say(f"node {outcome.failed} failed first, with exit code {outcome.code}{ended}")
    return outcome


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)
