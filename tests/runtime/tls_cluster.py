"""Ranks over tcp in threads of this process, with or without TLS, and a proxy between two."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disco.runtime.keys import make_keys
from disco.runtime.peers import Peers
from disco.runtime.tcp import Identity, Meeting, TcpTransport, listen
from disco.runtime.tcp.tls import Tls
from tests.runtime.at_once import at_once

TOKEN = b"a token for tests, long enough"
HOST = "127.0.0.1"


def keys_for(folder: Path, world_size: int, host: str = HOST) -> Path:
    """New keys of a new authority."""
    make_keys(folder, Peers(tuple((host, 1 + rank) for rank in range(world_size))))
    return folder


def load_all(folder: Path, world_size: int) -> list[Tls]:
    return [Tls.load(folder / f"rank-{rank}", rank) for rank in range(world_size)]


class Ranks:
    """Transports that have not met yet; change `addresses` before `connect` to put a proxy there.

    Args:
        tls: of each rank.
        tokens: of ranks with another one.
        claims: what ranks say they are, where that is not what they are.
    """

    def __init__(
        self,
        tls: Sequence[Tls | None],
        *,
        tokens: dict[int, bytes] | None = None,
        claims: dict[int, int] | None = None,
        meeting_s: float = 20.0,
        silence_s: float = 5.0,
    ) -> None:
        world_size = len(tls)
        self.listeners = [listen(HOST) for _ in range(world_size)]
        self.addresses: list[tuple[str, int]] = [made.getsockname()[:2] for made in self.listeners]
        self.transports = []
        for rank in range(world_size):
            identity = Identity((claims or {}).get(rank, rank), world_size, "a" * 64, "1")
            meeting = Meeting(
                identity,
                (tokens or {}).get(rank, TOKEN),
                self.listeners[rank],
                lambda peer: self.addresses[peer],
                tls=tls[rank],
            )
            self.transports.append(
                TcpTransport(rank, world_size, meeting, meeting_s=meeting_s, silence_s=silence_s)
            )

    def connect(self, ranks: Sequence[int] | None = None) -> list[BaseException | None]:
        members = range(len(self.transports)) if ranks is None else ranks
        return at_once(*(self.transports[rank].connect for rank in members))

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


# Bytes that came (on their way up, to who listens, or down), how many came that way before; what
# goes on instead.
Change = Callable[[bytes, bool, int], bytes]


@dataclass
class Proxy:
    """Carries one connection after the other to `target`, and keeps a copy of all that passes.

    Attributes:
        change: of what passes.
        passed: to who listens, and back.
        cut: closes the connection in the middle when set.
    """

    target: tuple[str, int]
    change: Change = lambda data, up, before: data
    passed: dict[bool, bytearray] = field(
        default_factory=lambda: {True: bytearray(), False: bytearray()}
    )
    cut: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._server = socket.create_server((HOST, 0))
        self._server.settimeout(0.05)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._server.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._server.accept()
            except TimeoutError:
                continue
            with near, contextlib.suppress(OSError):
                far = socket.create_connection(self.target)
                with far:
                    self._carry(near, far)

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        while not self._stop.is_set() and not self.cut.is_set():
            for sock in select.select([near, far], [], [], 0.02)[0]:
                data = sock.recv(1 << 16)
                if not data:
                    return
                up = sock is near
                changed = self.change(data, up, len(self.passed[up]))
                self.passed[up] += data
                (far if up else near).sendall(changed)
