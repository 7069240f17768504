"""Where the time of a request goes, step by step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from disco.executor.steps import REQUEST_SLOT, Step, Values

COMPUTE, PACK, WAIT = "compute", "pack", "wait"


@dataclass(frozen=True)
class Span:
    """One stretch of a request's time, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        name: of the step; of a wait, the step that could not begin, or "end" for messages that
            other ranks had still to take when all was computed.
        kind: "compute"; "pack", which is an exchange's own work: receives, packing, handing over to
            the transport; or "wait".
        bytes: of a pack, those sent; of a wait, those waited for; else 0.
    """

    name: str
    kind: str
    begin_ns: int
    end_ns: int
    bytes: int = 0


@dataclass
class Timeline:
    """A request's spans in order. Between them lie the executor's own steps and, where several
    requests are in flight, other requests: those count as waiting, if this one could not go on."""

    spans: list[Span] = field(default_factory=list)

    @property
    def compute_ms(self) -> float:
        """Sum over the spans of that kind; so the others."""
        return self._ms(COMPUTE)

    @property
    def pack_ms(self) -> float:
        return self._ms(PACK)

    @property
    def wait_ms(self) -> float:
        return self._ms(WAIT)

    @property
    def total_ms(self) -> float:
        """From the first span's begin to the last one's end."""
        return (self.spans[-1].end_ns - self.spans[0].begin_ns) / 1e6 if self.spans else 0.0

    def _ms(self, kind: str) -> float:
        return sum(s.end_ns - s.begin_ns for s in self.spans if s.kind == kind) / 1e6

    def waited(self, name: str, begin_ns: int, num_bytes: int) -> None:
        """Record a wait that ends now."""
        self.spans.append(Span(name, WAIT, begin_ns, time.perf_counter_ns(), num_bytes))


def timed(steps: Sequence[Step]) -> list[Step]:
    """The same steps, each of which writes a span into its request's timeline."""
    return [replace(step, run=_timed_run(step)) for step in steps]


def _timed_run(step: Step) -> Any:
    run, name, kind = step.run, step.name, step.kind

    def timed_run(values: Values) -> Any:
        request = values[REQUEST_SLOT]
        sent = request.bytes_sent
        begin = time.perf_counter_ns()
        result = run(values)
        end = time.perf_counter_ns()
        spans = request.timeline.spans
        spans.append(Span(name, kind, begin, end, request.bytes_sent - sent))
        return result

    return timed_run
