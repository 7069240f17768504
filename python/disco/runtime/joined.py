"""One rank in this process, of a cluster that a list of peers, torchrun or MPI makes up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from disco.errors import InputError, PeerLostError
from disco.executor import Executor, Transport
from disco.partition.shards import load_manifest, load_shard
from disco.runtime.calls import Calls, LedCall
from disco.runtime.devices import free_memory_on, make_current
from disco.runtime.gloo import GlooTransport
from disco.runtime.joined_streams import Following, Leading
from disco.runtime.memory_check import check_rank_fits
from disco.runtime.nccl import NcclTransport
from disco.runtime.places import Options, Place
from disco.runtime.rank_processes import RunResult
from disco.runtime.streams import (
    Item,
    check_idle,
    check_in_flight,
    check_nccl_stream,
    run_in_order,
)
from disco.runtime.survival import check_streams, check_survivable
from disco.runtime.tcp import TcpTransport
from disco.runtime.wrapped import engine_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What one call over all ranks came to.

    Attributes:
        outputs: what the model returned.
        latency_ms: from the inputs to the outputs, here, with what was tried before a loss.
        bytes_sent: payload bytes of this rank, the inputs not counted.
        lost: the ranks whose channels are missing in it; empty if it is exact.
        retries: how often it was begun again because of a loss.
    """

    outputs: Any
    latency_ms: float
    bytes_sent: int
    lost: frozenset[int] = frozenset()
    retries: int = 0


class JoinedRank:
    """This process as one rank of a running cluster; use as a context manager.

    All ranks enter, then one of them, the leader, calls `run`, and the others `follow` until its
    block ends.

    Args:
        directory: with manifest.json and this rank's shard.
        place: of this process.
        options: as given for `place`.
        threads: of the kernels; None leaves torch's number.
        leader: the rank that has the inputs.

    Raises:
        InputError: the shard is damaged or of another plan, a peer has another token or plan, the
            rank does not fit into memory.
        TransportError: (on entering) peers are missing; (later) one is lost.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        place: Place,
        options: Options,
        *,
        threads: int | None = None,
        leader: int = 0,
    ) -> None:
        if not 0 <= leader < place.world_size:
            raise InputError(
                f"leader {leader} was given for {place.world_size} ranks: give 0 to "
                f"{place.world_size - 1}"
            )
        self.place = place
        self.leader = leader
        self._directory = Path(directory)
        self._options = options
        self._threads = threads
        self._transport: Transport | None = None
        self._stream: Generator[RunResult | InputError, None, None] | None = None  # under way

    @property
    def leads(self) -> bool:
        return self.place.rank == self.leader

    def __enter__(self) -> JoinedRank:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        device = self.place.device
        make_current(device)
        manifest = load_manifest(self._directory)
        check_rank_fits(manifest, self.place.rank, free_memory_on(device))
        shard = load_shard(self._directory, self.place.rank)
        if self._options.degrades:
            check_survivable(manifest.plan, self.place.transport)
        self._transport = self.place.open(shard)
        deadline_s = self._options.deadline_s
        self._executor = Executor(
            shard.program,
            shard.weights,
            self._transport,
            deadline_s=deadline_s,
            device=device,
        )
        self._calls = Calls(self._transport, self.leader, deadline_s, self._options.degrades)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._transport is not None
        try:
            if self._stream is not None:
                self._stream.close()  # it uses the transport
            if kind is None and self.leads:
                self._calls.end()
        finally:
            self._transport.close()

    def run(self, *args: Any, **kwargs: Any) -> Answer:
        """(The leader.) One call over all ranks.

        With ``on_peer_loss="degrade"`` a call that loses a rank is begun again without it, and one
        that has come back takes part from the next call on.

        Raises:
            InputError: the model does not take these inputs.
            TransportError: a peer is lost.
        """
        transport = self._transport
        assert transport is not None and self.leads
        check_idle(self._stream)
        self._executor.check_call(args, kwargs)
        begin = time.perf_counter()
        retries = 0
        while True:
            try:
                self._take_back()
                outputs, sent = self._attempt(transport, args, kwargs)
            except PeerLostError as error:
                if not self._options.degrades:
                    raise
                _log.warning("going on without it: %s", error)
                self._go_on(self._losses(error))
                retries += 1
                continue
            latency_ms = (time.perf_counter() - begin) * 1e3
            return Answer(outputs, latency_ms, sent, transport.lost, retries)

    def run_stream(
        self, inputs: Iterable[Item], in_flight: int = 1, *, profile: bool = False
    ) -> Iterator[RunResult | InputError]:
        """(The leader.) As `RankProcesses.run_stream`, over the joined ranks.

        Results have this rank's outputs alone, and the latency here, which begins before the inputs
        are sent on. The other ranks' accounts come with messages of their own, after the outputs,
        and their clocks are aligned when the stream begins (`disco.runtime.clocks`).

        Raises:
            InputError: `in_flight` cannot be; several over gloo, whose messages cannot be asked
                whether they are there.
            TransportError: a peer is lost.
        """
        assert self._transport is not None and self.leads
        check_in_flight(in_flight)
        check_streams(self._options.on_peer_loss)
        check_nccl_stream(in_flight, isinstance(self._transport, NcclTransport))
        if in_flight > 1 and isinstance(engine_of(self._transport), GlooTransport):
            raise InputError(
                f"{in_flight} requests in flight were asked for over gloo, which cannot say "
                f"whether a message is there: use the tcp transport (it needs a token) or mpi"
            )
        ranks = Leading(
            self._executor, self._transport, self._calls, in_flight=in_flight, spans=profile
        )
        check_idle(self._stream)
        self._stream = run_in_order(inputs, ranks, in_flight)
        return self._stream

    def follow(self) -> int:
        """(The others.) Take part in the leader's calls until it ends. Returns how many.

        Raises:
            TransportError: the leader is lost, or another rank and losses are not survived.
        """
        count = 0
        assert self._transport is not None
        while (call := self._calls.next()) is not None:
            try:
                self._catch_up(call)
                with torch.inference_mode():
                    count += self._part_of(call)
            except PeerLostError as error:
                # The leader tells who is left, with the next call.
                if not self._options.degrades or error.rank == self.leader:
                    raise
                _log.warning("waiting for the leader to go on: %s", error)
        return count

    def _attempt(
        self, transport: Transport, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, int]:
        """Tell the others, and compute this rank's part: outputs, and bytes sent for them."""
        number = self._executor.next_request()
        told = {"request": number, "lost": sorted(transport.lost)}
        self._calls.tell(args, kwargs, told)
        self._executor.skip_to(number)
        before = transport.bytes_sent
        with torch.inference_mode():
            return self._executor(*args, **kwargs), transport.bytes_sent - before

    def _losses(self, error: PeerLostError) -> frozenset[int]:
        assert isinstance(self._transport, TcpTransport)
        return self._transport.losses() | {error.rank}

    def _take_back(self) -> None:
        """Let the ranks that are back take part again."""
        if self._options.degrades:
            assert isinstance(self._transport, TcpTransport)
            returned = self._transport.returned()
            if returned:
                self._calls.forget(returned)
                self._go_on(self._transport.lost - returned)

    def _go_on(self, lost: frozenset[int]) -> None:
        assert isinstance(self._transport, TcpTransport)
        self._calls.give_up()
        number = self._executor.next_request()
        self._executor.skip_to(number)
        self._transport.go_on(lost, number, self._options.deadline_s)

    def _part_of(self, call: LedCall) -> int:
        """Take part in a call, or in the stream that it begins. Returns how many calls it was."""
        assert self._transport is not None
        if "stream" in call.options:
            following = Following(self._executor, self._transport, self._calls, self.leader)
            return following.run(call)
        self._executor(*call.args, **call.kwargs)
        return 1

    def _catch_up(self, call: LedCall) -> None:
        """Do without the ranks that the leader does without."""
        if "request" not in call.options:
            return
        request = call.options["request"]
        if self._options.degrades:
            assert isinstance(self._transport, TcpTransport)
            lost = frozenset(call.options["lost"])
            self._transport.agree(lost, request, self._options.deadline_s)
        self._executor.skip_to(request)
