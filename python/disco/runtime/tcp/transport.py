"""The transport over plain sockets, for the networks that edge devices have.

No thread of its own: the kernel's socket buffers carry a payload while this thread computes, and
`progress`, called between kernels, pushes what did not fit. A peer that dies is noticed when its
connection ends; one that is stopped, or behind a cut link, by its silence: every rank says that it
is alive at least every `HEARTBEAT_S` while it computes or waits.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from disco.errors import DeadlineError, PeerLostError, TransportError
from disco.executor.transport import Handle, Transport
from disco.runtime.tcp.channel import Channel, TcpHandle
from disco.runtime.tcp.frames import GOODBYE, HEARTBEAT, MOST_EXCHANGES
from disco.runtime.tcp.meeting import Meeting, Peer

HEARTBEAT_S = 0.25
SILENCE_S = 2.0


class _Nothing(Handle):
    """An empty payload: there is no message."""

    __slots__ = ()

    @property
    def done(self) -> bool:
        return True

    @property
    def finished_ns(self) -> int:
        return 1  # before anything began


_NOTHING = _Nothing()


class TcpTransport(Transport):
    """Payloads over one TCP connection a pair of ranks.

    Args:
        rank, world_size: this member and how many there are.
        meeting: brings the peers together; its listener is closed once all are there, so that a
            stranger finds nothing to connect to.
        meeting_s: how long to wait for all peers, in seconds.
        silence_s: a peer that is waited for and says nothing for so long is lost, in seconds.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        meeting: Meeting,
        *,
        meeting_s: float = 30.0,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(rank, world_size)
        self._meeting = meeting
        self._meeting_s = meeting_s
        self._silence_s = silence_s
        self._channels: dict[int, Channel] = {}
        self._poll = select.poll()
        self._by_fd: dict[int, Channel] = {}
        self._closed = False
        self._lost: PeerLostError | None = None

    def connect(self) -> None:
        """Reach all peers.

        Raises:
            InputError: a peer has another token, plan, version or the same rank.
            TransportError: peers are missing.
        """
        try:
            peers = self._meeting.meet(self._meeting_s) if self.world_size > 1 else {}
        finally:
            self._meeting.listener.close()
        self.adopt(peers)

    def adopt(self, peers: Mapping[int, Peer]) -> None:
        """Talk to these peers from now on."""
        for rank, peer in peers.items():
            peer.sock.setblocking(False)
            channel = Channel(peer.sock, rank, peer.host, self)
            self._channels[rank] = channel
            fd = peer.sock.fileno()
            self._by_fd[fd] = channel
            self._poll.register(fd, select.POLLIN)

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if buffer.numel() == 0:
            return _NOTHING
        channel = self._channels[source]
        handle = TcpHandle(channel, buffer, exchange)
        # What came before the peer left counts.
        if not channel.take_early(handle, request):
            self._usable(channel, exchange).await_payload(handle, request)
        return handle

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""
        if buffer.numel() == 0:
            return _NOTHING
        channel = self._usable(self._channels[destination], exchange)
        handle = TcpHandle(channel, buffer, exchange)
        channel.send(handle, request)
        return handle

    def progress(self) -> None:
        """Push what is unsent, take what has come, and let peers know that this rank is alive."""
        for channel in self._channels.values():
            if channel.has_unsent:
                channel.flush()
        if len(self._channels) == 1:
            for channel in self._channels.values():
                channel.read()
        else:
            for fd, _ in self._poll.poll(0):
                self._by_fd[fd].read()
        self._say_alive()

    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; with an infinite deadline, as long as the peer is there.

        Raises:
            PeerLostError: a peer is gone, or (with a deadline) says nothing.
            DeadlineError: not done after `deadline_s` seconds, though the peer is alive.
        """
        self.wait_any((handle,), deadline_s)

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        """Block until one of `handles` is done; errors as of `wait`."""
        begin = time.monotonic()
        self.progress()
        while not any(handle.done for handle in handles):
            awaited = [handle for handle in handles if isinstance(handle, TcpHandle)]
            self._check(awaited, begin, deadline_s)
            self._sleep(begin + deadline_s - time.monotonic())
            self._say_alive()

    def close(self) -> None:
        """Say goodbye and close all connections. May be called more than once."""
        blamed = 1 + self._lost.rank if self._lost is not None else 0
        for channel in self._channels.values():
            channel.say(GOODBYE, blamed)
            channel.close()
        self._meeting.listener.close()
        self._closed = True

    def _usable(self, channel: Channel, exchange: int) -> Channel:
        assert 0 <= exchange < MOST_EXCHANGES, f"exchange {exchange} has no place in a header"
        if self._closed:
            raise TransportError(f"the transport of rank {self.rank} is closed")
        if channel.lost is not None:
            raise self._error(channel, exchange)
        return channel

    def _check(self, awaited: Sequence[TcpHandle], begin: float, deadline_s: float) -> None:
        """Raise if waiting for these makes no sense any more."""
        now = time.monotonic()
        for handle in awaited:
            silent_s = now - max(handle.channel.heard, begin)
            # Without a deadline the peer may have nothing to do, and no reason to say anything.
            if silent_s > self._silence_s and deadline_s < math.inf:
                handle.channel.lose(f"it has said nothing for {silent_s:.1f} s")
            if handle.channel.lost is not None:
                raise self._error(handle.channel, handle.exchange)
        for channel in self._channels.values():
            # Not awaited here, but others may wait for it, and then this rank waits for them. One
            # that left on purpose has sent all that anybody waits for.
            if channel.lost is not None and not channel.finished:
                raise self._error(channel, None)
        if now - begin > deadline_s:
            names = ", ".join(f"rank {h.channel.rank} ({h.channel.host})" for h in awaited)
            raise DeadlineError(
                f"rank {self.rank} waited {deadline_s:g} s for exchange {awaited[0].exchange} with "
                f"{names}, which is alive: allow more time"
            )

    def _error(self, channel: Channel, exchange: int | None) -> PeerLostError:
        """The loss to report: of the rank that the peer had lost, if that made it leave."""
        error = channel.error(exchange)
        other = None if channel.blamed is None else self._channels.get(channel.blamed)
        if other is not None:
            why = f"rank {channel.rank} ({channel.host}) has lost it"
            error = PeerLostError(other.rank, other.host, why, exchange)
        self._lost = error
        return error

    def _sleep(self, most_s: float) -> None:
        """Until a socket has something or takes something, at most until the next heartbeat."""
        for fd, channel in list(self._by_fd.items()):
            if channel.lost is None:
                wanted = select.POLLIN | (select.POLLOUT if channel.has_unsent else 0)
                self._poll.modify(fd, wanted)
            else:
                # A closed connection is always ready to say so.
                self._poll.unregister(fd)
                del self._by_fd[fd]
        timeout_ms = max(0.0, min(most_s, HEARTBEAT_S / 2)) * 1e3
        for fd, events in self._poll.poll(timeout_ms):
            channel = self._by_fd[fd]
            if events & select.POLLOUT:
                channel.flush()
            if events & ~select.POLLOUT:
                channel.read()

    def _say_alive(self) -> None:
        now = time.monotonic()
        for channel in self._channels.values():
            if now - channel.spoken > HEARTBEAT_S and not channel.has_unsent:
                channel.say(HEARTBEAT)
