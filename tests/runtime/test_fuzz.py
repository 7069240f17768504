"""Bytes that no peer of ours would send before it is known: nothing crashes, hangs or grows."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco.errors import InputError
from disco.runtime.tcp import Identity, TcpTransport
from disco.runtime.tcp.handshake import Handshake, StrangerError, accept, dial
from tests.runtime.at_once import at_once
from tests.runtime.resident import resident_kb
from tests.runtime.test_tcp import TOKEN, Ranks

RANK_0, RANK_1 = (Identity(rank, 2, "a" * 64, "1") for rank in range(2))


# The handshake alone, without sockets -------------------------------------------------------------


class End:
    """Drives one end: bytes in, bytes out."""

    def __init__(self, talk: Handshake) -> None:
        self._talk = talk
        self._wanted = 0
        self._have = b""
        self.result: Identity | None = None
        self.out = b""
        self._go(None)

    def feed(self, data: bytes) -> bytes:
        """What it says to this. Raises what the handshake raises."""
        self._have += data
        self.out = b""
        while self.result is None and len(self._have) >= self._wanted:
            taken, self._have = self._have[: self._wanted], self._have[self._wanted :]
            self._go(taken)
        return self.out

    def _go(self, data: bytes | None) -> None:
        try:
            step = next(self._talk) if data is None else self._talk.send(data)
            while isinstance(step, bytes):
                self.out += step
                step = next(self._talk)
            assert 0 < step <= 4096, "what is asked for is bounded"
            self._wanted = step
        except StopIteration as over:
            self.result = over.value


def conversation(
    change: Callable[[int, bytes], bytes], *, at_dialler: bool = False
) -> tuple[Identity | None, Identity | None]:
    """A handshake in which what one end says is changed; what both ends have found."""
    listener, dialler = End(accept(TOKEN, RANK_0, {})), End(dial(TOKEN, RANK_1))
    message, towards_listener = dialler.out, True
    for number in range(4):
        if towards_listener != at_dialler:
            message = change(number, message)
        message = (listener if towards_listener else dialler).feed(message)
        towards_listener = not towards_listener
    return listener.result, dialler.result


def test_unchanged_they_find_each_other() -> None:
    assert conversation(lambda _, message: message) == (RANK_1, RANK_0)


@settings(max_examples=300, deadline=None)
@given(
    number=st.integers(0, 3),
    position=st.integers(0, 400),
    value=st.integers(1, 255),
    at_dialler=st.booleans(),
)
def test_a_changed_byte_lets_nobody_in(
    number: int, position: int, value: int, at_dialler: bool
) -> None:
    touched = [False]

    def change(at: int, message: bytes) -> bytes:
        # Two bytes of the first message are padding.
        if at != number or position >= len(message) or (at < 2 and position in (10, 11)):
            return message
        touched[0] = True
        changed = bytearray(message)
        changed[position] ^= value
        return bytes(changed)

    try:
        found = conversation(change, at_dialler=at_dialler)
    except (InputError, StrangerError):
        assert touched[0]
        return
    # The end whose words were changed is not believed, whatever the other one has found.
    assert found == (RANK_1, RANK_0) if not touched[0] else found[1 if at_dialler else 0] is None


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(1, 300), proper=st.booleans())
def test_garbage_is_a_stranger(data: bytes, cut: int, proper: bool) -> None:
    """In pieces, with or without a proper beginning."""
    if proper:
        data = struct.pack("<8sHxx32s", b"disco\x00tp", 1, b"n" * 32) + data
    end = End(accept(TOKEN, RANK_0, {}))
    with contextlib.suppress(InputError, StrangerError):
        while data:
            piece, data = data[:cut], data[cut:]
            end.feed(piece)
    assert end.result is None


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=4096),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["rank", "plan", "x"]), inner, max_size=4)
            ),
        ).map(lambda value: json.dumps(value).encode()),
        st.just(b"[" * 4096),
        st.just(b'{"rank":' * 500),
        st.just(b'{"rank":1e999,"world_size":2,"plan":"a","program":"1"}'),
    )
)
def test_identities_of_who_knows_the_token(content: bytes) -> None:
    with contextlib.suppress(StrangerError):
        assert isinstance(Identity.from_bytes(content).rank, int)


# A meeting, with strangers at the door ------------------------------------------------------------


def _hello() -> bytes:
    return struct.pack("<8sHxx32s", b"disco\x00tp", 1, random.randbytes(32))


def _garbage(sock: socket.socket) -> None:
    sock.sendall(random.randbytes(random.randrange(1, 400)))


def _half(sock: socket.socket) -> None:
    sock.sendall(_hello()[: random.randrange(44)])


def _long_proof(sock: socket.socket) -> None:
    """Announces an identity as long as the field can say."""
    sock.sendall(_hello() + struct.pack("<HH32s", 0, 65535, bytes(32)) + bytes(1000))


def _wrong_proof(sock: socket.socket) -> None:
    sock.sendall(_hello() + struct.pack("<HH32s", 0, 40, random.randbytes(32)) + bytes(40))


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.sendall(_hello())


def _nothing(sock: socket.socket) -> None:
    pass


_SIDES, _OPEN_A_SIDE = 8, 7
STRANGERS = (_garbage, _half, _long_proof, _wrong_proof, _reset, _nothing)


def flood(address: tuple[str, int], count: int) -> int:
    """`count` strangers of all kinds, from several sides; how many were let connect."""
    # One side would wait whenever the listener's queue is full: the kernel tries again after 1 s.
    with ThreadPoolExecutor(_SIDES) as pool:
        return sum(pool.map(lambda _: _one_side(address, count // _SIDES), range(_SIDES)))


def _one_side(address: tuple[str, int], count: int) -> int:
    connected = 0
    held: list[socket.socket] = []
    for number in range(count):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(address, timeout=2)
            connected += 1
            held.append(sock)
            STRANGERS[number % len(STRANGERS)](sock)
        if len(held) > _OPEN_A_SIDE:
            held.pop(0).close()
    for sock in held:
        sock.close()
    return connected


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _a_flooded_meeting(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 waits for rank 1 while strangers come; then rank 1 comes, too."""
    ranks = Ranks(2, meeting_s=400.0)
    before, resident = descriptors(), resident_kb()
    most = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], descriptors())

    def late() -> None:
        try:
            assert flood(ranks.addresses[0], count) > 0.9 * count
        finally:
            ranks.transports[1].connect()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        errors = at_once(ranks.transports[0].connect, late, timeout_s=500)
    took = time.monotonic() - begin
    stop.set()
    watcher.join()
    assert errors == [None, None]
    # Both ends are here: 64 of the flood's, 32 strangers and one more, a few of the ranks.
    assert most[0] - before <= _SIDES * (_OPEN_A_SIDE + 1) + 33 + 6
    assert descriptors() - before <= 1, "a listener a rank less, two ends of one connection more"
    assert resident_kb() - resident < 20_000
    lines = [record for record in caplog.records if "was refused" in record.getMessage()]
    assert 1 <= len(lines) <= 1 + took / 5.0
    exchange(*ranks.transports)
    ranks.close()


def exchange(a: TcpTransport, b: TcpTransport) -> None:
    buffer = torch.empty(4)
    handle = a.post_receive(buffer, 1, 0, 0)
    b.send(torch.ones(4), 0, 0, 0)
    a.wait(handle, 5)
    assert torch.equal(buffer, torch.ones(4))


def test_hundreds_of_strangers_at_a_meeting(caplog: pytest.LogCaptureFixture) -> None:
    _a_flooded_meeting(160, caplog)


@pytest.mark.slow
def test_ten_thousand_strangers_at_a_meeting(caplog: pytest.LogCaptureFixture) -> None:
    _a_flooded_meeting(10_000, caplog)


def test_strangers_that_send_a_byte_at_a_time() -> None:
    """More of them than there is room for, until rank 1 comes."""
    ranks = Ranks(2, meeting_s=30.0)
    stop, dripping = threading.Event(), threading.Event()

    def drip() -> None:
        held: list[tuple[socket.socket, bytes]] = []
        for _ in range(50):
            with contextlib.suppress(OSError):
                held.append((socket.create_connection(ranks.addresses[0], timeout=2), _hello()))
        dripping.set()
        position = 0
        while not stop.wait(0.02):
            for sock, data in held:
                with contextlib.suppress(OSError):
                    sock.sendall(data[position % 44 : position % 44 + 1])
            position += 1
        for sock, _ in held:
            sock.close()

    def late() -> None:
        assert dripping.wait(20)
        time.sleep(0.5)
        try:
            ranks.transports[1].connect()
        finally:
            stop.set()

    assert at_once(ranks.transports[0].connect, drip, late) == [None] * 3
    exchange(*ranks.transports)
    ranks.close()


def test_no_descriptor_left_at_a_meeting() -> None:
    """A process at its limit of open files goes on, and meets its peer when some are free again."""
    ranks = Ranks(2, meeting_s=30.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [socket.socket() for _ in range(3)]
    for sock in waiting:
        sock.setblocking(False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), hard))
    try:
        for sock in waiting:
            sock.connect_ex(ranks.addresses[0])
            sock.setblocking(True)

        def late() -> None:
            time.sleep(1.0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            ranks.transports[1].connect()

        worked = time.process_time()
        assert at_once(ranks.transports[0].connect, late) == [None, None]
        assert time.process_time() - worked < 0.7, "it spins while no descriptor is left"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in waiting:
            sock.close()
    exchange(*ranks.transports)
    ranks.close()
