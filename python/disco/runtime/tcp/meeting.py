"""How ranks come together: every rank listens, and dials the ranks below it.

Nothing here blocks on one connection: handshakes of peers and of strangers go on side by side, so
many of the latter at a time, and each has to be over soon.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from disco.errors import InputError, TransportError
from disco.runtime.tcp.handshake import (
    DOCTOR,
    Identity,
    StrangerError,
    TakenError,
    accept,
    check_agreement,
    dial,
)
from disco.runtime.tcp.talk import Talk
from disco.runtime.tcp.tls import Tls
from disco.runtime.tcp.tls_socket import TlsSocket, name_rank

Address = tuple[str, int]
AddressOf = Callable[[int], "Address | None"]

_HANDSHAKE_S = 5.0
_MOST_STRANGERS = 32  # handshakes under way with those who connected to us
_REDIAL_S = 0.1
_LOOK_S = 0.01  # at most, while a run goes on
_ANEW_S = 5.0
_REDIAL_LOST_S = 1.0  # a rank that may come back
_LOG_S = 5.0
_POLL_S = 0.05
# The same where something is on its way, for which there are no probes: unacknowledged for so long.
_UNACKNOWLEDGED_MS = 10_000
# Probes begin after 5 s without traffic, come every second, and the fifth without answer ends it.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 5}

_log = logging.getLogger(__name__)


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket on one address; port 0 lets the kernel choose.

    Raises:
        InputError: nobody can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be listened on: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_MOST_STRANGERS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise InputError(
            f"{host}:{port} cannot be listened on: {error.strerror}: give an address of this "
            f"machine and a port that is free"
        ) from None
    return listener


def name_of(address: Address) -> str:
    """``host:port``, as messages have it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tune(sock: socket.socket | TlsSocket) -> None:
    """Small messages leave at once; a peer whose machine is gone is noticed even between calls."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS lacks some
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


@dataclass
class Peer:
    """A rank that has proved itself."""

    rank: int
    host: str
    sock: socket.socket | TlsSocket


@dataclass
class Meeting:
    """Bring this rank and its peers together, or say who is missing and why.

    Args:
        identity: of this rank.
        token: the shared secret.
        listener: from `listen`.
        address_of: where a rank listens; None while that is not known.
        strict: a peer that refuses this rank ends the meeting, rather than being one more reason
            why it is missing.
        tls: this rank's certificate and key; None goes without TLS.
        patient: where this rank is connected already, that may be a process before this one, whose
            end is not known yet: try again.

    Attributes:
        peers: by rank, those that are there.
        returning: the peers had gone on without this rank, and take it back.
    """

    identity: Identity
    token: bytes
    listener: socket.socket
    address_of: AddressOf
    strict: bool = True
    tls: Tls | None = None
    patient: bool = False
    peers: dict[int, Peer] = field(default_factory=dict)
    returning: bool = False
    _anew: float = 0.0
    _without: set[int] = field(default_factory=set)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _talks: dict[socket.socket | TlsSocket, Talk] = field(default_factory=dict)
    _redial: dict[int, float] = field(default_factory=dict)
    _why: dict[int, str] = field(default_factory=dict)
    _refusals: set[int | None] = field(default_factory=set)
    _refused: int = 0
    _refused_why: str = ""
    _logged: float = 0.0

    def meet(self, timeout_s: float) -> dict[int, Peer]:
        """All peers by rank, connected.

        Raises:
            InputError: a peer has another token, plan, version or the same rank.
            TransportError: peers are missing after `timeout_s`.
        """
        missing = self.attempt(timeout_s)
        if missing:
            for peer in self.peers.values():
                peer.sock.close()
            raise TransportError(self._who_is_missing(missing, timeout_s))
        return self.peers

    def attempt(self, timeout_s: float) -> dict[int, str]:
        """As `meet`, but who is missing, and why, is returned; `peers` are there."""
        end = time.monotonic() + timeout_s
        self._selector.register(self.listener, selectors.EVENT_READ)
        try:
            while (missing := self._missing()) and time.monotonic() <= end:
                self._begin_anew_if_late()
                self._dial_those(missing, _REDIAL_S)
                self._turn(_POLL_S)
        except BaseException:
            for peer in self.peers.values():
                peer.sock.close()
            raise
        finally:
            for talk in list(self._talks.values()):
                self._drop(talk)
            self._selector.unregister(self.listener)
        return {rank: self._why_missing(rank) for rank in missing}

    def _begin_anew_if_late(self) -> None:
        """Of ranks that come back, one may wait for another that has been lost since the others
        said who is there. Ask them again."""
        if not self.returning or time.monotonic() < self._anew:
            return
        for peer in self.peers.values():
            peer.sock.close()
        self.peers.clear()
        self._without.clear()
        self.returning = False

    def go_on_without(self, lost: Collection[int], back: Container[int] = ()) -> None:
        """From now on let these ranks come back, and tell whoever comes which they are.

        Args:
            lost: the ranks that are done without.
            back: those among them that are connected again.
        """
        self.identity = replace(self.identity, lost=tuple(sorted(lost)))
        self._without.clear()
        for rank in lost:
            if rank not in back:
                self.peers.pop(rank, None)
        if self.listener not in self._selector.get_map():
            self._selector.register(self.listener, selectors.EVENT_READ)

    def look(self) -> None:
        """(After `go_on_without`.) Go on with the handshakes of ranks that come back; never blocks.

        What is no rank of ours, or of another plan, is refused with a line of log.
        """
        try:
            self._dial_those(self._missing(), _REDIAL_LOST_S)
            end = time.monotonic() + _LOOK_S
            while self._turn(0.0) and time.monotonic() < end:
                pass
        except InputError as error:
            self._log_refusal("a rank that would come back", str(error))

    def close(self) -> None:
        """Stop listening. May be called more than once."""
        for talk in list(self._talks.values()):
            self._drop(talk)
        self._selector.close()
        self.listener.close()

    def _missing(self) -> list[int]:
        ranks = range(self.identity.world_size)
        here = {self.identity.rank, *self.peers, *self._without}
        return [rank for rank in ranks if rank not in here]

    def _turn(self, most_s: float) -> bool:
        """Whatever can go on now, or within `most_s` seconds; False if nothing could."""
        ready = self._selector.select(most_s)
        for key, _ in ready:
            if key.fileobj is self.listener:
                self._accept()
            else:
                talk = self._talks.get(key.fileobj)  # type: ignore[call-overload]
                if talk is not None:
                    self._advance(talk)
        now = time.monotonic()
        for talk in [t for t in self._talks.values() if t.until < now]:
            self._failed(talk, "it did not answer")
        return bool(ready)

    def _dial_those(self, ranks: Iterable[int], again_s: float) -> None:
        """Those of `ranks` that are below this one, each at most every `again_s` seconds."""
        dialled = {talk.dialled for talk in self._talks.values()}
        now = time.monotonic()
        for rank in ranks:
            if rank > self.identity.rank or rank in dialled or self._redial.get(rank, 0.0) > now:
                continue
            address = self.address_of(rank)
            if address is None:
                self._why[rank] = "it has not said where it listens"
                continue
            self._redial[rank] = now + again_s
            try:
                family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            except OSError as error:
                self._why[rank] = f"{name_of(address)}: {error.strerror}"
                continue
            plain = socket.socket(family, socket.SOCK_STREAM)
            plain.setblocking(False)
            plain.connect_ex(where)
            sock = plain if self.tls is None else self.tls.dialled(plain, address[0], rank)
            talk = dial(self.token, self.identity)
            self._add(Talk(sock, name_of(address), talk, 0.0, dialled=rank, connected=False))

    def _accept(self) -> None:
        try:
            plain, address = self.listener.accept()
        except OSError as error:  # gone already, or no descriptor is left
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_POLL_S)  # it stays ready to be accepted
            return
        plain.setblocking(False)
        sock = plain if self.tls is None else self.tls.accepted(plain)
        strangers = [talk for talk in self._talks.values() if talk.dialled is None]
        if len(strangers) >= _MOST_STRANGERS:
            self._failed(strangers[0], "too many connect at once")
        talk = Talk(sock, name_of(address[:2]), accept(self.token, self.identity, self.peers), 0.0)
        self._add(talk)

    def _add(self, talk: Talk) -> None:
        talk.until = time.monotonic() + _HANDSHAKE_S
        self._talks[talk.sock] = talk
        self._selector.register(talk.sock, talk.events)
        if talk.connected:
            self._advance(talk)

    def _advance(self, talk: Talk) -> None:
        try:
            over = talk.advance()
        except (OSError, StrangerError) as error:
            text = error.strerror if isinstance(error, OSError) else None
            self._failed(talk, text or str(error) or type(error).__name__)
            return
        except InputError as error:
            again = self.patient and isinstance(error, TakenError)
            if talk.dialled is None or not self.strict or again:
                # Whoever connects can say anything until it has proved that it knows the token.
                self._failed(talk, str(error))
                self._refusals.add(talk.dialled)
                return
            self._drop(talk)
            raise InputError(f"rank {talk.dialled} ({talk.host}): {error}") from None
        if not over:
            self._selector.modify(talk.sock, talk.events)
            return
        assert talk.result is not None
        self._welcome(talk, talk.result)

    def _welcome(self, talk: Talk, theirs: Identity) -> None:
        if (theirs.program == DOCTOR) != (self.identity.program == DOCTOR):
            self._failed(talk, "a run and a doctor do not meet: both see that they can talk")
            return
        if isinstance(talk.sock, TlsSocket) and talk.sock.certified_rank != theirs.rank:
            certified = name_rank(talk.sock.certified_rank)
            self._failed(
                talk,
                f"it says that it is rank {theirs.rank}, and its certificate is of {certified}",
            )
            return
        self._forget(talk)
        try:
            check_agreement(self.identity, theirs, talk.host)
            if talk.dialled not in (None, theirs.rank):
                raise InputError(
                    f"{talk.host} is where rank {talk.dialled} should be, and rank {theirs.rank} "
                    f"is there: correct the list of peers"
                )
            if theirs.rank in self.peers:
                raise InputError(f"two processes say that they are rank {theirs.rank}")
        except InputError:
            talk.sock.close()
            raise
        _tune(talk.sock)
        self.peers[theirs.rank] = Peer(theirs.rank, talk.host, talk.sock)
        if self.identity.rank in theirs.lost:
            if not self.returning:
                self._anew = time.monotonic() + _ANEW_S
            self.returning = True
            self._without.update(theirs.lost)

    def _failed(self, talk: Talk, why: str) -> None:
        self._drop(talk)
        if talk.dialled is not None:
            if talk.dialled not in self._refusals:  # says more than that it is gone by now
                self._why[talk.dialled] = f"{talk.host}: {why}"
            return
        self._log_refusal(f"a connection from {talk.host}", why)

    def _log_refusal(self, who: str, why: str) -> None:
        """One line, but not for each of a flood."""
        self._refused += 1
        self._refused_why = why
        now = time.monotonic()
        if now - self._logged > _LOG_S:
            self._logged = now
            _log.warning("%s was refused: %s (%d so far)", who, why, self._refused)

    def _forget(self, talk: Talk) -> None:
        self._selector.unregister(talk.sock)
        del self._talks[talk.sock]

    def _drop(self, talk: Talk) -> None:
        self._forget(talk)
        talk.sock.close()

    def _why_missing(self, rank: int) -> str:
        unknown = "it has not connected" if rank > self.identity.rank else "not reached"
        return self._why.get(rank, unknown)

    def _who_is_missing(self, missing: Mapping[int, str], timeout_s: float) -> str:
        parts = [f"rank {rank} ({why})" for rank, why in missing.items()]
        refused = ""
        if self._refused:
            refused = f"; {self._refused} connections were refused, the last: {self._refused_why}"
        return (
            f"rank {self.identity.rank} of {self.identity.world_size} missed "
            f"{', '.join(parts)} after {timeout_s:g} s{refused}"
        )
