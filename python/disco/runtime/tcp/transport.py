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
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from disco.errors import DeadlineError, PeerLostError, TransportError
from disco.executor.transport import NOTHING, Handle, Transport
from disco.runtime.tcp.channel import Channel, TcpHandle
from disco.runtime.tcp.frames import (
    GOODBYE,
    HEARTBEAT,
    LOST,
    MOST_EXCHANGES,
    MOST_PAYLOAD_BYTES,
    READY,
)
from disco.runtime.tcp.meeting import Meeting, Peer

HEARTBEAT_S = 0.25
SILENCE_S = 2.0
_LOOK_S = 0.05  # between two looks at ranks that would come back
_POLL_S = 0.005


class TcpTransport(Transport):
    """Payloads over one TCP connection a pair of ranks.

    Args:
        rank, world_size: this member and how many there are.
        meeting: brings the peers together. Its listener is closed once all are there, so that a
            stranger finds nothing to connect to, unless ranks may come back.
        meeting_s: how long to wait for all peers, in seconds.
        silence_s: a peer that is waited for and says nothing for so long is lost, in seconds.
        survives: the loss of a peer fails the request under way and no more. The ranks agree on
            those that are left (`go_on`), and lost ones may come back.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        meeting: Meeting,
        *,
        meeting_s: float = 30.0,
        silence_s: float = SILENCE_S,
        survives: bool = False,
    ) -> None:
        super().__init__(rank, world_size)
        self.survives = survives
        self._returned: dict[int, Channel] = {}
        self._reported: set[int] = set()  # lost by this rank, and the others told
        self._next_look = 0.0
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
        except BaseException:
            self._meeting.close()
            raise
        self.adopt(peers)
        if not self.survives:
            self._meeting.close()
            return
        there = {self.rank, *peers}
        self.lost = frozenset(rank for rank in range(self.world_size) if rank not in there)
        self._meeting.go_on_without(self.lost)
        if self._meeting.returning:
            for channel in self._channels.values():
                channel.say(READY)

    def adopt(self, peers: Mapping[int, Peer]) -> None:
        """Talk to these peers from now on."""
        for rank, peer in peers.items():
            self._channels[rank] = self._listen_to(peer)

    def _listen_to(self, peer: Peer) -> Channel:
        peer.sock.setblocking(False)
        channel = Channel(peer.sock, peer.rank, peer.host, self)
        fd = peer.sock.fileno()
        self._by_fd[fd] = channel
        self._poll.register(fd, select.POLLIN)
        return channel

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if buffer.numel() == 0:
            return NOTHING
        channel = self._channels[source]
        handle = TcpHandle(channel, buffer, exchange)
        # What came before the peer left counts.
        if not channel.take_early(handle, request):
            self._usable(channel, exchange).await_payload(handle, request)
        return handle

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""
        if buffer.numel() == 0:
            return NOTHING
        if buffer.nbytes > MOST_PAYLOAD_BYTES:
            raise TransportError(
                f"rank {self.rank}: a message of {buffer.nbytes} bytes to rank {destination} was "
                f"given, and tcp carries up to {MOST_PAYLOAD_BYTES}: use smaller batches, or gloo "
                f"or mpi"
            )
        channel = self._usable(self._channels[destination], exchange)
        handle = TcpHandle(channel, buffer, exchange)
        channel.send(handle, request)
        return handle

    def progress(self) -> None:
        """Push what is unsent, take what has come, and let peers know that this rank is alive."""
        for channel in self._channels.values():
            if channel.has_unsent:
                channel.flush()
        if len(self._by_fd) == 1:
            for channel in self._by_fd.values():
                channel.read()
        else:
            for fd, _ in self._poll.poll(0):
                self._by_fd[fd].read()
        self._say_alive()
        if self.survives:
            self._look_for_ranks()

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
            if self.survives:
                self._look_for_ranks()

    # Losing ranks, and getting them back ---------------------------------------------------------

    def losses(self) -> frozenset[int]:
        """Ranks that are lost, as far as this one knows: those that it does without, those whose
        connection is gone, and those that a rank that is there says it has lost.

        Of two ranks that have lost each other the higher one.
        """
        channels = self._channels
        gone = {rank for rank, channel in channels.items() if channel.lost is not None}
        for rank in sorted(set(channels) - gone):
            known = {self.rank, *channels} - gone
            for other in sorted(channels[rank].reported & known):
                mutual = other == self.rank or rank in channels[other].reported
                gone.add(max(rank, other) if mutual else other)
        # What another rank says of this one is said of itself.
        return (
            self.lost
            | (gone - {self.rank})
            | ({r for r, c in channels.items() if self.rank in c.reported} - self.lost)
        )

    def returned(self) -> frozenset[int]:
        """Lost ranks that are connected again, to all who are there."""
        return frozenset(r for r, c in self._returned.items() if c.ready and c.lost is None)

    def agree(self, lost: frozenset[int], request: int, within_s: float) -> None:
        """`go_on`, unless this rank does so already and knows of no other loss."""
        if lost != self.lost or self.losses() != lost:
            self.go_on(lost, request, within_s)

    def await_return(self, ranks: Collection[int], within_s: float) -> None:
        """Until these lost ranks are back.

        Raises:
            TransportError: they are not after `within_s` seconds.
        """
        end = time.monotonic() + within_s
        while not self.returned().issuperset(ranks):
            if time.monotonic() > end:
                missing = sorted(set(ranks) - self.returned())
                raise TransportError(f"ranks {missing} did not come back within {within_s:g} s")
            self.progress()
            time.sleep(_POLL_S)

    def go_on(self, lost: frozenset[int], request: int, within_s: float) -> None:
        """Do without these ranks and with all others, from this request on.

        Args:
            lost: of the ranks, the same on all that are left; it may lack ranks that were lost and
                are back.
            request: the first one; what comes of earlier ones is thrown away.
            within_s: how long a rank that is back may take to be connected here, too.

        Raises:
            PeerLostError: a rank that should be there is not.
            TransportError: this rank is one of those that are lost.
        """
        if self.rank in lost:
            raise TransportError(f"the other ranks go on without rank {self.rank}")
        for rank in lost & set(self._channels):
            channel = self._channels.pop(rank)
            self._forget(channel)
            channel.close()
        self._reported.clear()
        self._lost = None
        for channel in self._channels.values():
            channel.reported.clear()
            channel.forget_before(request)
        self.lost |= lost
        self._meeting.go_on_without(self.lost, back=self._returned)
        for rank in sorted(self.lost - lost):
            self._take_back(rank, within_s)
        self.lost = lost
        self._meeting.go_on_without(lost, back=self._returned)

    def _take_back(self, rank: int, within_s: float) -> None:
        end = time.monotonic() + within_s
        while rank not in self._returned and time.monotonic() < end:
            if any(rank in channel.reported for channel in self._channels.values()):
                break  # lost again
            self.progress()
            time.sleep(_POLL_S)
        back = self._returned.pop(rank, None)
        if back is None:
            for other in self._channels.values():
                other.say(LOST, rank)
            why = "it is not connected to this rank, though it is to others"
            raise PeerLostError(rank, "not connected", why)
        self._channels[rank] = back

    def _look_for_ranks(self) -> None:
        """Tell the others whom this rank has lost, and let lost ones come back."""
        for channel in list(self._channels.values()):
            if channel.lost is not None and channel.rank not in self._reported:
                self._reported.add(channel.rank)
                for other in self._channels.values():
                    other.say(LOST, channel.rank)
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        if not self.lost:
            return
        self._meeting.look()
        for rank, peer in self._meeting.peers.items():
            if rank in self.lost and (
                rank not in self._returned or self._returned[rank].stream is not peer.sock
            ):
                self._drop_returned(rank)
                self._returned[rank] = self._listen_to(peer)
        for rank, channel in list(self._returned.items()):
            if channel.lost is not None:
                self._drop_returned(rank)
                self._meeting.go_on_without(self.lost, back=self._returned)

    def _drop_returned(self, rank: int) -> None:
        channel = self._returned.pop(rank, None)
        if channel is not None:
            self._forget(channel)
            channel.close()

    def _forget(self, channel: Channel) -> None:
        for fd, known in list(self._by_fd.items()):
            if known is channel:
                self._poll.unregister(fd)
                del self._by_fd[fd]

    # ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye and close all connections. May be called more than once."""
        blamed = 1 + self._lost.rank if self._lost is not None else 0
        for channel in self._channels.values():
            channel.say(GOODBYE, blamed)
            channel.close()
        for channel in self._returned.values():
            channel.close()
        self._meeting.close()
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
        if self.survives:
            self._look_for_ranks()
            if deadline_s == math.inf:
                return  # between requests the others' losses are the leader's affair
            for rank in sorted(self.losses() - self.lost):
                why = self._channels[rank].lost or "another rank has lost it"
                raise PeerLostError(rank, self._channels[rank].host, why, awaited[0].exchange)
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
