"""Running programs: one rank over a transport, all ranks in one process, or one alone."""

from disco.executor.executor import DEADLINE_S, Executor
from disco.executor.in_process import InProcessHub, InProcessTransport
from disco.executor.pipelined import Done, Source, pipeline, run_pipelined
from disco.executor.timeline import Recorder, Span, Timeline, Transfer
from disco.executor.together import run_together
from disco.executor.transport import Handle, Transport

__all__ = [
    "DEADLINE_S",
    "Done",
    "Executor",
    "Handle",
    "InProcessHub",
    "InProcessTransport",
    "Recorder",
    "Source",
    "Span",
    "Timeline",
    "Transfer",
    "Transport",
    "pipeline",
    "run_pipelined",
    "run_together",
]
