"""Several requests of one rank in flight: while one waits for a payload, another one computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from disco.errors import DeadlineError, InputError, PeerLostError, TransportError
from disco.executor.executor import Executor
from disco.executor.timeline import Recorder
from disco.executor.transport import Handle, Transport


class Source(Protocol):
    """Where requests come from while others are under way."""

    def take(self, idle: bool) -> Sequence[Tensor] | None:
        """The flat inputs of the next request, or None.

        Args:
            idle: no request is under way: wait for one, and None means that there will be none any
                more. Otherwise this must not block, and None means that there is none now.
        """


@dataclass
class Done:
    """A request that has ended.

    Attributes:
        outputs: what the model returned.
        begin_ns, end_ns: when it was begun and when its outputs were there
            (`time.perf_counter_ns`). Between them other requests ran, too.
        record: of its steps, if that was asked for.
    """

    outputs: Any
    begin_ns: int
    end_ns: int
    record: Recorder | None


@dataclass
class _InFlight:
    """One request under way.

    Attributes:
        number: of the request.
        running: its generator.
        begin_ns: when it was begun.
        record: where it is taken down, or None.
        handle: what it waits for, or None if it can go on.
        done: once it has ended.
    """

    number: int
    running: Generator[Handle, None, Any]
    begin_ns: int
    record: Recorder | None
    handle: Handle | None = None
    done: Done | None = None


def run_pipelined(
    executor: Executor, transport: Transport, requests: Iterable[Sequence[Tensor]], in_flight: int
) -> Iterator[Any]:
    """Outputs of one request after the other, in their order.

    The oldest request that can go on does, until it has to wait for a payload that is not there;
    a new one is begun when all in flight wait. Results are those of calls one by one, bit for bit.

    Every rank has to be given the same requests in the same order. How they are interleaved is each
    rank's own affair, and so is ``in_flight``: messages are matched by (request, exchange, source,
    destination), not by the order in which they are sent. The oldest request never waits for a
    younger one, on no rank, so ranks cannot wait for each other in a circle.

    Each request in flight has buffers of its own (activations and messages; the packed weights are
    shared), which later requests of the same shapes use again.

    Args:
        executor: of this rank.
        transport: to the other ranks; nothing else may use it meanwhile.
        requests: per request the flat inputs (`Executor.flat_inputs`). One is taken when it can be
            begun, and no more than ``in_flight`` are ahead of the results.
        in_flight: requests under way at a time, at least 1.

    Raises:
        InputError: ``in_flight`` below 1; inputs that do not fit (the request is named).
        TransportError: the exchange failed; DeadlineError: nothing arrived within the executor's
            deadline. They name the request. All requests in flight are given up then, and what they
            had posted stays posted: the transport is not to be used again.
    """
    found = pipeline(executor, transport, _Given(iter(requests)), in_flight)
    return (done.outputs for done in found)


def pipeline(
    executor: Executor, transport: Transport, source: Source, in_flight: int, record: bool = False
) -> Iterator[Done]:
    """`run_pipelined` for requests that are not all there yet, with when each ran.

    Args:
        source: is asked for a request when one can be begun; while others are under way it may
            have none, and they go on.
        record: take down the steps of each request.
    """
    if in_flight < 1:
        raise InputError(f"in_flight must be at least 1, given {in_flight}")
    return _pipelined(executor, transport, source, in_flight, record)


@dataclass
class _Given:
    """Requests that an iterator gives whenever it is asked."""

    requests: Iterator[Sequence[Tensor]]

    def take(self, idle: bool) -> Sequence[Tensor] | None:
        return next(self.requests, None)


def _pipelined(
    executor: Executor, transport: Transport, source: Source, in_flight: int, record: bool
) -> Iterator[Done]:
    under_way: deque[_InFlight] = deque()
    try:
        while True:
            while under_way and (done := under_way[0].done) is not None:
                under_way.popleft()
                yield done
            ready = next((one for one in under_way if _ready(one)), None)
            if ready is not None:
                _advance(ready)
                continue
            if len(under_way) < in_flight:
                inputs = source.take(idle=not under_way)
                if inputs is not None:
                    under_way.append(_begin(executor, transport, inputs, record))
                    continue
                if not under_way:
                    return
            _wait(executor, transport, under_way)
    finally:
        for one in under_way:
            one.running.close()


def _begin(
    executor: Executor, transport: Transport, inputs: Sequence[Tensor], record: bool
) -> _InFlight:
    number, begin_ns = executor.next_request(), time.perf_counter_ns()
    recorder = Recorder() if record else None
    try:
        running = executor.start(inputs, transport, number, recorder)
    except InputError as error:
        raise InputError(f"request {number}: {error}") from error
    return _InFlight(number, running, begin_ns, recorder)


def _ready(one: _InFlight) -> bool:
    try:
        return one.done is None and (one.handle is None or one.handle.done)
    except TransportError as error:
        raise _named(error, one.number) from error


def _advance(one: _InFlight) -> None:
    """Until it has to wait, or to its end."""
    try:
        with torch.no_grad():
            one.handle = next(one.running)
    except StopIteration as finished:
        end_ns = time.perf_counter_ns()
        one.done = Done(finished.value, one.begin_ns, end_ns, one.record)
    except TransportError as error:
        raise _named(error, one.number) from error


def _wait(executor: Executor, transport: Transport, under_way: Sequence[_InFlight]) -> None:
    waiting = [one for one in under_way if one.handle is not None and one.done is None]
    try:
        transport.wait_any([one.handle for one in waiting if one.handle], executor.deadline_s)
    except TransportError as error:
        raise _named(error, waiting[0].number) from error


def _named(error: TransportError, number: int) -> TransportError:
    """The same error, of the same kind, that names the request."""
    text = f"request {number}: {error}"
    if isinstance(error, PeerLostError):
        # Whoever handles it asks for its rank; its own constructor would make another text.
        lost = PeerLostError.__new__(PeerLostError, text)
        vars(lost).update(vars(error))
        return lost
    return DeadlineError(text) if isinstance(error, DeadlineError) else TransportError(text)
