"""A stream of requests, several of them in flight, with their results in order."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from disco.errors import InputError

# Transports match messages by the number of their request modulo 16 (MPI), and each one in flight
# has memory of its own.
MOST_IN_FLIGHT = 16
# Requests that wait at the ranks beside those in flight, so that none waits for the next.
_AHEAD = 2

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Call:
    """The arguments of one request, as for the model that was captured."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


# One of a stream: arguments, the only argument, or why there are none.
Item = Call | Tensor | InputError


class Ranks(Protocol[Result_co]):
    """What runs requests."""

    def feed(self, number: int, call: Call) -> None:
        """Let them have a request; returns before it is done.

        Raises:
            InputError: it is none of a model's, and nothing has happened.
        """

    def collect(self) -> tuple[int, Result_co | InputError]:
        """Wait for any request that was fed: its number, and its result or why it was refused."""


def check_in_flight(in_flight: int) -> None:
    """Raises InputError for a number that cannot be."""
    if not 1 <= in_flight <= MOST_IN_FLIGHT:
        raise InputError(
            f"{in_flight} requests in flight were asked for; give 1 to {MOST_IN_FLIGHT}"
        )


def check_nccl_stream(in_flight: int, nccl: bool) -> None:
    """Raises InputError for several requests in flight over NCCL."""
    if nccl and in_flight > 1:
        raise InputError(
            f"{in_flight} requests in flight were asked for over NCCL, which matches messages by "
            f"their order alone: ask for 1, or use transport tcp"
        )


def check_idle(stream: Generator[Any, None, None] | None) -> None:
    """Raises InputError if there is one that has not ended: two would mix their messages."""
    if stream is not None and inspect.getgeneratorstate(stream) != inspect.GEN_CLOSED:
        raise InputError(
            "a stream of requests is under way: take its results to the end or close it first"
        )


def run_in_order(
    inputs: Iterable[Item], ranks: AbstractContextManager[Ranks[Result]], in_flight: int
) -> Generator[Result | InputError, None, None]:
    """A result for each of the inputs, in their order; an InputError stands in its place.

    Args:
        inputs: taken as they can be used.
        ranks: entered at the first result that is asked for; left when all is done, when the
            iterator is closed, and with any exception.
        in_flight: requests under way at a time; a few more are kept at hand.
    """
    results: dict[int, Result | InputError] = {}
    order: deque[int] = deque()
    outstanding = 0
    with ranks as running:
        for number, item in enumerate(inputs):
            order.append(number)
            if isinstance(item, InputError):
                results[number] = item
            else:
                try:
                    running.feed(number, item if isinstance(item, Call) else Call((item,)))
                    outstanding += 1
                except InputError as error:
                    results[number] = error
            while outstanding >= in_flight + _AHEAD:
                done, result = running.collect()
                results[done] = result
                outstanding -= 1
            while order and order[0] in results:
                yield results.pop(order.popleft())
        while order:
            while order[0] not in results:
                done, result = running.collect()
                results[done] = result
            yield results.pop(order.popleft())
