"""The transport over MPI (mpi4py): for clusters that have it, in processes that mpiexec started.

MPI decides who belongs to the job; nothing is authenticated or encrypted here, and losing a rank
ends the job, as MPI has it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

from torch import Tensor

from disco.errors import DeadlineError, InputError, TransportError
from disco.executor.transport import Handle, Transport
from disco.runtime.tcp.memory import bytes_of

_EXCHANGE_BITS = 16
_REQUESTS = 1 << 4  # only neighbouring requests are ever under way together
_SPIN_S = 50e-6
_NAP_S = 20e-6
# Of MPICH and Intel's MPI, Open MPI, and Slurm's own launcher.
_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")


def started_by_mpi() -> bool:
    """True in a process that mpiexec started."""
    return any(name in os.environ for name in _RANK_VARIABLES)


def load_mpi() -> Any:
    """mpi4py's module. Raises InputError if it is not installed or finds no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"the mpi transport cannot be used ({error}): pip install 'disco-kernels[mpi]'"
        ) from None
    return MPI


def abort_job(code: int) -> None:
    """End all ranks' processes if MPI runs in this one, which has failed: MPI would wait for it."""
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        module.COMM_WORLD.Abort(code)


class MpiHandle(Handle):
    """One MPI request, and the buffer that it uses."""

    __slots__ = ("_finished_ns", "buffer", "is_receive", "peer", "request", "transport")

    def __init__(
        self, transport: MpiTransport, request: Any, buffer: Tensor, peer: int, is_receive: bool
    ) -> None:
        self.transport = transport
        self.request = request
        self.buffer = buffer
        self.peer = peer
        self.is_receive = is_receive
        self._finished_ns = 0 if request is not None else 1  # nothing to wait for

    @property
    def done(self) -> bool:
        """Asks MPI, which moves data along by being asked."""
        if not self._finished_ns and self.request.Test():
            self._finished_ns = time.perf_counter_ns()
            if self.is_receive:
                self.transport.bytes_received += self.buffer.nbytes
            else:
                self.transport.bytes_sent += self.buffer.nbytes
                self.transport.sends.discard(self)
        return self._finished_ns != 0

    @property
    def finished_ns(self) -> int:
        """When MPI was asked and it was done."""
        return self._finished_ns


class MpiTransport(Transport):
    """Payloads as MPI messages of bytes, in a communicator of their own.

    Args:
        communicator: None for a copy of the world's.
    """

    def __init__(self, communicator: Any = None) -> None:
        self._mpi = load_mpi()
        self._communicator = communicator or self._mpi.COMM_WORLD.Dup()
        super().__init__(self._communicator.Get_rank(), self._communicator.Get_size())
        largest = self._communicator.Get_attr(self._mpi.TAG_UB)
        if largest < (_REQUESTS << _EXCHANGE_BITS) - 1:
            raise InputError(
                f"this MPI has tags up to {largest}, and the mpi transport needs "
                f"{(_REQUESTS << _EXCHANGE_BITS) - 1}: use another transport"
            )
        # MPI uses a buffer until the request has been seen to end, whatever the caller keeps.
        self.sends: set[MpiHandle] = set()

    def connect(self) -> None:
        """Nothing to do: mpiexec has done it."""

    def agree(self, mine: Any) -> list[Any]:
        """What every rank says of itself, by rank."""
        return list(self._communicator.allgather(mine))

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if buffer.numel() == 0:
            return MpiHandle(self, None, buffer, source, True)
        tag = _tag(exchange, request)
        started = self._communicator.Irecv([bytes_of(buffer), self._mpi.BYTE], source, tag)
        return MpiHandle(self, started, buffer, source, True)

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""
        if buffer.numel() == 0:
            return MpiHandle(self, None, buffer, destination, False)
        tag = _tag(exchange, request)
        started = self._communicator.Isend([bytes_of(buffer), self._mpi.BYTE], destination, tag)
        handle = MpiHandle(self, started, buffer, destination, False)
        self.sends.add(handle)
        return handle

    def progress(self) -> None:
        """Let MPI move data along."""
        for handle in list(self.sends):
            handle.done  # noqa: B018 - asking is what moves it
        if not self.sends:
            self._communicator.Iprobe()

    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; DeadlineError after `deadline_s` seconds."""
        begin = time.monotonic()
        try:
            while not handle.done:
                waited = time.monotonic() - begin
                if waited > deadline_s:
                    assert isinstance(handle, MpiHandle)
                    verb = "receiving from" if handle.is_receive else "sending to"
                    raise DeadlineError(
                        f"rank {self.rank} waited {deadline_s:g} s {verb} rank {handle.peer}"
                    )
                if waited > _SPIN_S:
                    time.sleep(_NAP_S if deadline_s < math.inf else 1e-3)
        except self._mpi.Exception as error:
            raise TransportError(f"rank {self.rank}: MPI failed: {error}") from error

    def close(self) -> None:
        """Nothing: MPI ends with the process, and waits for the other ranks then."""
        self.sends.clear()


def _tag(exchange: int, request: int) -> int:
    assert 0 <= exchange < 1 << _EXCHANGE_BITS, f"exchange {exchange} has no place in a tag"
    return (request % _REQUESTS) << _EXCHANGE_BITS | exchange
