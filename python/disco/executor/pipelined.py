"""Several requests of one rank in flight: while one waits for a payload, another one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disco.errors import DeadlineError, InputError, TransportError
from disco.executor.executor import Executor
from disco.executor.transport import Handle, Transport


@dataclass
class _InFlight:
    """One request under way.

    Attributes:
        number: of the request.
        running: its generator.
        handle: what it waits for, or None if it can go on.
        finished: whether `outputs` are there.
    """

    number: int
    running: Generator[Handle, None, Any]
    handle: Handle | None = None
    finished: bool = False
    outputs: Any = None


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
    if in_flight < 1:
        raise InputError(f"in_flight must be at least 1, given {in_flight}")
    return _pipelined(executor, transport, iter(requests), in_flight)


def _pipelined(
    executor: Executor, transport: Transport, requests: Iterator[Sequence[Tensor]], in_flight: int
) -> Iterator[Any]:
    under_way: deque[_InFlight] = deque()
    more = True
    try:
        while more or under_way:
            while under_way and under_way[0].finished:
                yield under_way.popleft().outputs
            ready = next((one for one in under_way if _ready(one)), None)
            if ready is not None:
                _advance(ready)
            elif more and len(under_way) < in_flight:
                inputs = next(requests, None)
                if inputs is None:
                    more = False
                else:
                    under_way.append(_begin(executor, transport, inputs))
            elif under_way:
                _wait(executor, transport, under_way)
    finally:
        for one in under_way:
            one.running.close()


def _begin(executor: Executor, transport: Transport, inputs: Sequence[Tensor]) -> _InFlight:
    number = executor.next_request()
    try:
        return _InFlight(number, executor.start(inputs, transport, number))
    except InputError as error:
        raise InputError(f"request {number}: {error}") from error


def _ready(one: _InFlight) -> bool:
    try:
        return not one.finished and (one.handle is None or one.handle.done)
    except TransportError as error:
        raise _named(error, one.number) from error


def _advance(one: _InFlight) -> None:
    """Until it has to wait, or to its end."""
    try:
        with torch.no_grad():
            one.handle = next(one.running)
    except StopIteration as finished:
        one.outputs, one.finished = finished.value, True
    except TransportError as error:
        raise _named(error, one.number) from error


def _wait(executor: Executor, transport: Transport, under_way: Sequence[_InFlight]) -> None:
    waiting = [one for one in under_way if one.handle is not None and not one.finished]
    try:
        transport.wait_any([one.handle for one in waiting if one.handle], executor.deadline_s)
    except TransportError as error:
        raise _named(error, waiting[0].number) from error


def _named(error: TransportError, number: int) -> TransportError:
    kind = DeadlineError if isinstance(error, DeadlineError) else TransportError
    return kind(f"request {number}: {error}")
