"""How far the clocks of the ranks are apart: `time.perf_counter_ns` of every one counts from a
moment of its own.

A few round trips over the ranks' transport, as in NTP (RFC 5905, section 8): the leader's request
leaves at t0 and comes back at t3, and the other rank's clock shows t1 when it arrives and t2 when
the answer leaves. With equal delays both ways the other clock is ahead by
((t1 - t0) + (t2 - t3)) / 2. Whatever the delays, this is off by at most half of the round trip
(t3 - t0) - (t2 - t1), so the fastest of several counts. Drift is not corrected: clocks of
computers drift 10 to 50 us a second apart, so a long stream outlives its alignment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from disco.executor.transport import Transport
from disco.runtime.tcp.frames import FIRST_CALL_EXCHANGE

# A number that no plan gives to an exchange.
CLOCK_EXCHANGE = FIRST_CALL_EXCHANGE + 4
# The fastest of so many is close to the shortest possible on an idle link; they take milliseconds.
ROUNDS = 16

Clock = Callable[[], int]


@dataclass(frozen=True)
class ClockOffset:
    """Another rank's clock, seen from the leader.

    Attributes:
        ahead_ns: what it shows more than the leader's.
        error_ns: how far that may be off, either way.
    """

    ahead_ns: int = 0
    error_ns: int = 0


def measure_offsets(
    transport: Transport, deadline_s: float, clock: Clock = time.perf_counter_ns
) -> tuple[ClockOffset, ...]:
    """(The leader.) One per rank, of which all others `answer_offsets` at the same time.

    Args:
        transport: connected, with nothing under way.
        deadline_s: for every message.

    Raises:
        TransportError: a peer is lost.
    """
    mine = transport.rank
    return tuple(
        ClockOffset() if rank == mine else _measure(transport, rank, deadline_s, clock)
        for rank in range(transport.world_size)
    )


def _measure(transport: Transport, peer: int, deadline_s: float, clock: Clock) -> ClockOffset:
    found: list[ClockOffset] = []
    answer = torch.zeros(2, dtype=torch.int64)
    for number in range(ROUNDS):
        receive = transport.post_receive(answer, peer, CLOCK_EXCHANGE, number)
        t0 = clock()
        send = transport.send(torch.zeros(1, dtype=torch.int64), peer, CLOCK_EXCHANGE, number)
        transport.wait(receive, deadline_s)
        t3 = clock()
        transport.wait(send, deadline_s)
        t1, t2 = (int(t) for t in answer)
        round_trip = (t3 - t0) - (t2 - t1)
        found.append(ClockOffset(((t1 - t0) + (t2 - t3)) // 2, -(-round_trip // 2) + 1))
    return min(found, key=lambda each: each.error_ns)


def answer_offsets(
    transport: Transport, leader: int, deadline_s: float, clock: Clock = time.perf_counter_ns
) -> None:
    """(The others.) Take part in the leader's `measure_offsets`; arguments and errors as there."""
    question = torch.zeros(1, dtype=torch.int64)
    for number in range(ROUNDS):
        receive = transport.post_receive(question, leader, CLOCK_EXCHANGE, number)
        transport.wait(receive, deadline_s)
        t1 = clock()
        # Reading the clock and handing over lie between t2 and the answer's leaving: they count to
        # the round trip, and so to the error.
        times = torch.tensor([t1, clock()], dtype=torch.int64)
        transport.wait(transport.send(times, leader, CLOCK_EXCHANGE, number), deadline_s)
