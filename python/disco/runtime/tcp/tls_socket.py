"""A connected socket under TLS, with those calls of a plain one that handshake and channel make.

Nothing blocks: where the socket has nothing, or takes nothing, `BlockingIOError` is raised, as by a
plain non-blocking socket, also while TLS shakes hands. That begins with the first call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import cast

from disco.errors import InputError
from disco.runtime.tcp.handshake import MAGIC, TLS_ONLY

# The most that one TLS record carries (RFC 8446, section 5.1).
RECORD_BYTES = 1 << 14
_RANK_URI = "disco-rank:"
_NOT_PLAIN = "start all ranks with --tls, or none"
# What `verify_code` says of a certificate (X509_V_ERR_... of OpenSSL).
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_HOST = (62, 64)


class TlsError(OSError):
    """TLS failed: another protocol, a changed record, an unusable certificate."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPROTO, why)


def rank_uri(rank: int) -> str:
    """How a certificate says whose it is, as a URI among its subject's alternative names."""
    return f"{_RANK_URI}{rank}"


def rank_of(certificate: Mapping[str, object]) -> int | None:
    """The rank that a verified certificate (as `ssl` describes it) is for; None if for none."""
    names = certificate.get("subjectAltName", ())
    assert isinstance(names, tuple)
    uris = [name for kind, name in names if kind == "URI" and name.startswith(_RANK_URI)]
    text = uris[0][len(_RANK_URI) :] if len(uris) == 1 else ""
    return int(text) if text.isdecimal() else None


def name_rank(rank: int | None) -> str:
    """What `rank_of` has found, in words."""
    return "no rank" if rank is None else f"rank {rank}"


def why_unverified(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a certificate, to follow "the certificate"."""
    if error.verify_code == _EXPIRED:
        return "has expired"
    if error.verify_code == _NOT_YET_VALID:
        return "is not valid yet"
    if error.verify_code in _OTHER_HOST:
        where = error.verify_message.rsplit(" ", 1)[-1].strip("'.")
        return f"is not for {where}, where the list of peers has it"
    return f"is not of this cluster's authority ({error.verify_message})"


class TlsSocket:
    """One end of a connection under TLS.

    Args:
        sock: connected, or about to be, and non-blocking; it belongs to this object from now on.
        wrap: puts it under TLS, once it is connected.
        dialled: the rank that this end connected to, which the other end's certificate has to be
            for; None if the other end connected to this one.

    Attributes:
        certified_rank: of the other end, by its certificate; None before the handshake is over.
    """

    def __init__(
        self,
        sock: socket.socket,
        wrap: Callable[[socket.socket], ssl.SSLSocket],
        *,
        dialled: int | None = None,
    ) -> None:
        self.certified_rank: int | None = None
        self._sock = sock
        self._wrap = wrap
        self._dialled = dialled
        self._tls: ssl.SSLSocket | None = None
        self._secured = False
        self._heard = False
        self._closed = False
        self._events = selectors.EVENT_READ
        self._record = bytearray(RECORD_BYTES)

    # The meeting: a handshake of ranks inside of TLS ------------------------------------------

    @property
    def handshake_events(self) -> int | None:
        """What TLS waits for in its own handshake (of `selectors`); None once that is over."""
        return None if self._secured else self._events

    def send(self, data: bytes) -> int:
        """As of a socket.

        Raises:
            BlockingIOError: nothing was taken; come again with the same bytes.
            InputError: one end's certificate, or its lack of TLS, is a mistake of the user.
            OSError: the connection failed.
        """
        try:
            return self._write(memoryview(data)[:RECORD_BYTES])
        except BlockingIOError:
            raise
        except OSError:
            with contextlib.suppress(BlockingIOError):
                self.recv(1)  # the other end may have said why before it left
            raise

    def recv(self, num_bytes: int) -> bytes:
        """As of a socket; errors as of `send`."""
        buffer = bytearray(num_bytes)
        try:
            return bytes(buffer[: self.recv_into(memoryview(buffer))])
        except TlsError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLError) and _refuses_certificate(cause):
                raise InputError(str(error.strerror)) from cause
            raise

    def setblocking(self, flag: bool) -> None:
        """A channel wants it non-blocking, which it is."""
        assert not flag, "nothing here may block"

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """As of a socket."""
        self._any.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int) -> int:
        """As of a socket."""
        return self._any.getsockopt(level, option)

    # The channel -------------------------------------------------------------------------------

    def sendmsg(self, buffers: list[memoryview], /) -> int:
        """Encrypt and hand over at most one record.

        A header and the beginning of its payload share a record, for which they are copied; the
        rest of a payload is encrypted from where it lies.

        Returns:
            how many bytes of the buffers are on their way.

        Raises:
            BlockingIOError: none is, as far as the caller goes: the next call has to begin with the
                same bytes, of which a part may have left.
            OSError: the connection failed.
        """
        first = buffers[0]
        if len(buffers) == 1 or len(first) >= RECORD_BYTES:
            return self._write(first[:RECORD_BYTES])
        filled = 0
        for buffer in buffers:
            part = buffer[: RECORD_BYTES - filled]
            self._record[filled : filled + len(part)] = part
            filled += len(part)
        return self._write(memoryview(self._record)[:filled])

    def recv_into(self, buffer: memoryview, /) -> int:
        """Bytes out of at most one record, 0 at the end.

        TLS may hold the rest of the record, of which `select.poll` knows nothing: call until
        BlockingIOError.
        """
        tls = self._secure()
        try:
            # Never `recv_into`: on a socket without TLS that reads plain bytes.
            return cast(int, tls.read(len(buffer), buffer))
        except ssl.SSLError as error:
            raise _translated(error) from error

    def fileno(self) -> int:
        """As of a socket; -1 once it is closed."""
        return self._any.fileno()

    def close(self) -> None:
        """As of a socket. What ends a run is a frame of its own, so TLS has nothing to add."""
        self._closed = True
        self._any.close()

    # TLS ---------------------------------------------------------------------------------------

    @property
    def _any(self) -> socket.socket:
        return self._sock if self._tls is None else self._tls

    def _write(self, record: memoryview) -> int:
        tls = self._secure()
        try:
            return tls.write(record)
        except ssl.SSLError as error:
            raise _translated(error) from error

    def _secure(self) -> ssl.SSLSocket:
        """Go on with the handshake of TLS; returns once it is over."""
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._secured:
            assert self._tls is not None
            return self._tls
        self._refuse_plain()
        if self._tls is None:
            self._tls = self._wrap(self._sock)
        try:
            self._tls.do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"its certificate {why_unverified(error)}") from error
        except ssl.SSLError as error:
            write = isinstance(error, ssl.SSLWantWriteError)
            self._events = selectors.EVENT_WRITE if write else selectors.EVENT_READ
            translated = _translated(error)
            if _refuses_certificate(error):
                raise InputError(str(translated.strerror)) from error
            raise translated from error
        certificate = self._tls.getpeercert()
        assert certificate, "verified, so it is there"
        self.certified_rank = rank_of(certificate)
        if self._dialled not in (None, self.certified_rank):
            raise InputError(
                f"its certificate is of {name_rank(self.certified_rank)}, and rank "
                f"{self._dialled} should be there: give it that rank's files, or correct the list "
                f"of peers"
            )
        self._secured = True
        return self._tls

    def _refuse_plain(self) -> None:
        """See from the first bytes that the other end does without TLS, and tell it."""
        if self._heard:
            return
        try:
            # Not of an SSLSocket: that has no peeking.
            begin = socket.socket.recv(self._any, len(MAGIC), socket.MSG_PEEK)
        except BlockingIOError:
            if self._dialled is not None:
                return  # this end speaks first
            raise
        self._heard = True
        if not begin or not MAGIC.startswith(begin):
            return
        if self._dialled is not None:
            raise InputError(f"it does not use TLS, and this rank does: {_NOT_PLAIN}")
        # Read what has come: closing a socket with unread bytes takes the answer back.
        socket.socket.recv(self._any, 1 << 12)
        self._sock.send(TLS_ONLY)
        raise TlsError(f"it does not use TLS, and this rank does: {_NOT_PLAIN}")


def _refuses_certificate(error: ssl.SSLError) -> bool:
    """The other end says that it does not take this one's certificate."""
    reason = error.reason or ""
    return "_ALERT_" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason)


def _translated(error: ssl.SSLError) -> OSError:
    """As a plain socket would say it."""
    if isinstance(error, (ssl.SSLWantReadError, ssl.SSLWantWriteError)):
        return BlockingIOError(errno.EAGAIN, "not now")
    reason = error.reason or str(error)
    words = reason.rpartition("_ALERT_")[2].replace("_", " ").lower()
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return TlsError("it closed the connection")
    if _refuses_certificate(error):
        return TlsError(f"it does not take this rank's certificate ({words})")
    if "_ALERT_" in reason:
        return TlsError(f"it ended TLS ({words})")
    return TlsError(f"what came is not TLS of this cluster, or was changed on the way ({words})")
