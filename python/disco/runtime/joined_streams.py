"""A stream of requests over joined ranks: the leader's side, and the others'.

The leader's requests run in a thread of their own, which alone uses the transport meanwhile: an
image that takes long to load, or a result that takes long to use, keeps nobody waiting in the
middle of a request.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.executor import Executor, Handle, Transport, pipeline
from disco.executor.pipelined import Done
from disco.runtime.accounts import Account, reports
from disco.runtime.calls import Calls, LedCall
from disco.runtime.clocks import ClockOffset, answer_offsets, measure_offsets
from disco.runtime.rank_processes import RunResult
from disco.runtime.streams import Call
from disco.runtime.tcp.frames import FIRST_CALL_EXCHANGE

# Numbers that no plan gives to an exchange.
_SIZE_EXCHANGE, _BODY_EXCHANGE = FIRST_CALL_EXCHANGE + 2, FIRST_CALL_EXCHANGE + 3


class Following:
    """(The others.) Take part in one stream of the leader.

    Args:
        executor, transport, calls: of this rank.
        leader: the rank that leads.
    """

    def __init__(self, executor: Executor, transport: Transport, calls: Calls, leader: int) -> None:
        self._executor = executor
        self._transport = transport
        self._calls = calls
        self._leader = leader
        self._sending: list[Handle] = []
        self._ended = False

    def run(self, begin: LedCall) -> int:
        """Until the leader ends the stream. Returns how many requests it had.

        Args:
            begin: the call that began it.
        """
        deadline_s = self._executor.deadline_s
        answer_offsets(self._transport, self._leader, deadline_s)
        count = 0
        for done in pipeline(
            self._executor, self._transport, self, begin.options["stream"], record=True
        ):
            assert done.record is not None
            account = Account.of(
                done.record, done.begin_ns, done.end_ns, spans=begin.options["spans"]
            )
            self._report(account, count)
            count += 1
        return count

    def take(self, idle: bool) -> Sequence[Tensor] | None:
        """See `disco.executor.Source`."""
        if idle:
            self._wait_for_reports()
        if self._ended:
            return None
        call = self._calls.next() if idle else self._calls.poll()
        if call is None or "end" in call.options:
            self._ended = idle or call is not None
            return None
        return self._executor.flat_inputs(call.args, call.kwargs)

    def _report(self, account: Account, number: int) -> None:
        content = bytearray(json.dumps(account.to_plain(), separators=(",", ":")).encode())
        body = torch.frombuffer(content, dtype=torch.uint8)
        size = torch.tensor([body.numel()])
        self._sending = [handle for handle in self._sending if not handle.done]
        for exchange, buffer in ((_SIZE_EXCHANGE, size), (_BODY_EXCHANGE, body)):
            self._sending.append(self._transport.send(buffer, self._leader, exchange, number))

    def _wait_for_reports(self) -> None:
        while self._sending:
            self._transport.wait(self._sending.pop(), self._executor.deadline_s)


class _Report:
    """(The leader.) Another rank's account of one request, as it arrives."""

    def __init__(self, transport: Transport, peer: int, number: int, deadline_s: float) -> None:
        self._transport = transport
        self._peer = peer
        self._number = number
        self._deadline_s = deadline_s
        self._size = torch.zeros(1, dtype=torch.int64)
        self._body: Tensor | None = None
        self._handle = self._post(self._size, _SIZE_EXCHANGE)

    def take(self, wait: bool) -> Account | None:
        """The account; None if it is not there and `wait` is False."""
        if not self._is_there(wait):
            return None
        if self._body is None:
            self._body = torch.empty(int(self._size), dtype=torch.uint8)
            self._handle = self._post(self._body, _BODY_EXCHANGE)
            if not self._is_there(wait):
                return None
        return Account.from_plain(json.loads(self._body.numpy().tobytes()))

    def _is_there(self, wait: bool) -> bool:
        if wait:
            self._transport.wait(self._handle, self._deadline_s)
        return self._handle.done

    def _post(self, buffer: Tensor, exchange: int) -> Handle:
        return self._transport.post_receive(buffer, self._peer, exchange, self._number)


@dataclass
class _Begun:
    """(The leader.) One request: its number in the stream, when it was taken, and how it went."""

    number: int
    taken_ns: int
    done: Done | None = None
    reports: dict[int, _Report | Account] | None = None


class Leading:
    """(The leader.) Runs what is fed in a thread of its own; see `disco.runtime.streams.Ranks`.

    Args:
        executor, transport, calls: of this rank; nothing else may use them until it is left.
        in_flight: requests under way at a time.
        spans: whether results have timelines.
    """

    def __init__(
        self,
        executor: Executor,
        transport: Transport,
        calls: Calls,
        *,
        in_flight: int,
        spans: bool,
    ) -> None:
        self._executor = executor
        self._transport = transport
        self._calls = calls
        self._in_flight = in_flight
        self._spans = spans
        self._fed: queue.Queue[tuple[int, Call] | None] = queue.Queue()
        self._results: queue.Queue[tuple[int, RunResult | InputError] | None] = queue.Queue()
        self._begun: deque[_Begun] = deque()  # not yet through the pipeline
        self._ran: deque[_Begun] = deque()  # not yet reported by all ranks
        self._count = 0
        self._offsets: tuple[ClockOffset, ...] = ()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(torch.get_num_threads(),), name="stream", daemon=True
        )

    def __enter__(self) -> Leading:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Requests under way are finished, those not begun are dropped."""
        while not self._fed.empty():
            try:
                self._fed.get_nowait()
            except queue.Empty:
                break
        self._fed.put(None)
        self._thread.join()
        if self._error is not None and (kind is None or kind is GeneratorExit):
            raise self._error

    def feed(self, number: int, call: Call) -> None:
        """See `disco.runtime.streams.Ranks`."""
        self._executor.check_call(call.args, call.kwargs)
        self._fed.put((number, call))

    def collect(self) -> tuple[int, RunResult | InputError]:
        """See `disco.runtime.streams.Ranks`. Raises TransportError if a peer is lost."""
        found = self._results.get()
        if found is None:
            assert self._error is not None, "more was collected than fed"
            raise self._error
        return found

    # In the thread ------------------------------------------------------------------------------

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a thread begins with a number of its own
        try:
            with torch.inference_mode():
                self._run()
        except BaseException as error:  # noqa: BLE001 - whoever collects raises it
            self._error = error
        self._results.put(None)

    def _run(self) -> None:
        deadline_s = self._executor.deadline_s
        self._calls.tell((), {}, {"stream": self._in_flight, "spans": self._spans})
        self._offsets = measure_offsets(self._transport, deadline_s)
        for done in pipeline(self._executor, self._transport, self, self._in_flight, record=True):
            request = self._begun.popleft()
            request.done = done
            request.reports = {
                peer: _Report(self._transport, peer, self._count, deadline_s)
                for peer in range(self._transport.world_size)
                if peer != self._transport.rank
            }
            self._count += 1
            self._ran.append(request)
            self._hand_out(wait=False)
        self._calls.tell((), {}, {"end": True})

    def take(self, idle: bool) -> Sequence[Tensor] | None:
        """See `disco.executor.Source`."""
        self._hand_out(wait=idle)
        if self._ended:
            return None
        try:
            item = self._fed.get(block=idle)
        except queue.Empty:
            return None
        if item is None:
            self._ended = True
            return None
        number, call = item
        taken_ns = time.perf_counter_ns()
        tell = self._calls.tell if idle else self._calls.begin
        tell(call.args, call.kwargs)
        self._begun.append(_Begun(number, taken_ns))
        return self._executor.flat_inputs(call.args, call.kwargs)

    def _hand_out(self, wait: bool) -> None:
        """The results of requests that all ranks have reported."""
        while self._ran:
            request = self._ran[0]
            assert request.reports is not None
            for peer, report in request.reports.items():
                if isinstance(report, _Report):
                    account = report.take(wait)
                    if account is None:
                        return
                    request.reports[peer] = account
            self._ran.popleft()
            self._results.put((request.number, self._result(request)))

    def _result(self, request: _Begun) -> RunResult:
        done, others = request.done, request.reports
        assert done is not None and done.record is not None and others is not None
        mine = Account.of(done.record, request.taken_ns, done.end_ns, self._spans)
        accounts: list[Any] = [others.get(rank, mine) for rank in range(self._transport.world_size)]
        aligned = [a.shifted(-o.ahead_ns) for a, o in zip(accounts, self._offsets, strict=True)]
        found = reports(aligned)
        return RunResult(
            outputs=(done.outputs,),
            bytes_sent=tuple(rank.bytes_sent for rank in found),
            bytes_received=tuple(rank.bytes_received for rank in found),
            latency_ms=found[self._transport.rank].latency_ms,
            ranks=found,
            timelines=tuple(account.timeline for account in aligned) if self._spans else (),
            clock_error_ns=tuple(offset.error_ns for offset in self._offsets),
            begin_ns=min(account.begin_ns for account in aligned),
            end_ns=max(account.end_ns for account in aligned),
        )
