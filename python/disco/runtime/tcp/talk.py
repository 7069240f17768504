"""One handshake over one socket, as far as the socket lets it go on."""

from __future__ import annotations

import os
import selectors
import socket
from dataclasses import dataclass

from disco.runtime.tcp.handshake import (
    Handshake,
    Identity,
    StrangerError,
)
from disco.runtime.tcp.tls_socket import TlsSocket


@dataclass
class Talk:
    """A handshake under way over one socket."""

    sock: socket.socket | TlsSocket
    host: str
    talk: Handshake
    until: float
    dialled: int | None = None
    unsent: bytes = b""
    wanted: int = 0
    got: bytes = b""
    connected: bool = True
    result: Identity | None = None
    fresh: bool = True

    def advance(self) -> bool:
        """Go on as far as the socket lets it; True once it is over.

        Raises:
            OSError, StrangerError, InputError: it failed.
        """
        if not self.connected:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            self.connected = True
        try:
            if self.fresh:
                self.fresh = False
                self._take(next(self.talk))
            while True:
                if self.unsent:
                    self.unsent = self.unsent[self.sock.send(self.unsent) :]
                    if not self.unsent:
                        self._take(next(self.talk))
                elif len(self.got) == self.wanted:
                    data, self.got = self.got, b""
                    self._take(self.talk.send(data))
                else:
                    data = self.sock.recv(self.wanted - len(self.got))
                    if not data:
                        raise StrangerError("it closed the connection in the handshake")
                    self.got += data
        except BlockingIOError:
            return False
        except StopIteration as over:
            self.result = over.value
            return True

    def _take(self, step: bytes | int) -> None:
        if isinstance(step, bytes):
            self.unsent = step
        else:
            self.wanted = step

    @property
    def events(self) -> int:
        if self.connected and isinstance(self.sock, TlsSocket):
            events = self.sock.handshake_events
            if events is not None:
                return events
        sends = self.unsent or not self.connected
        return selectors.EVENT_WRITE if sends else selectors.EVENT_READ
