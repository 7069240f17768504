"""Bytes that a peer that has proved itself would not send: nothing crashes, hangs or grows."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from disco.errors import PeerLostError, TransportError
from disco.runtime.tcp import TcpTransport
from disco.runtime.tcp.frames import (
    DATA,
    GOODBYE,
    HEADER_BYTES,
    HEARTBEAT,
    KINDS,
    LOST,
    READY,
    pack_header,
)
from tests.runtime.at_once import at_once
from tests.runtime.resident import resident_kb
from tests.runtime.test_tcp import Ranks


@contextlib.contextmanager
def victim_and_peer(silence_s: float = 1.0) -> Iterator[tuple[TcpTransport, socket.socket]]:
    """Rank 0's transport, and the naked socket of rank 1."""
    ranks = Ranks(2, silence_s=silence_s)
    assert ranks.connect() == [None, None]
    stream = ranks.transports[1]._channels[0].stream
    assert isinstance(stream, socket.socket)
    stream.setblocking(True)
    stream.settimeout(5)
    try:
        yield ranks.transports[0], stream
    finally:
        ranks.close()


def outcome(victim: TcpTransport, frames: bytes, peer: socket.socket) -> str:
    """What a rank that waits for 16 bytes of exchange 3 makes of these."""
    buffer = torch.zeros(4)
    errors: list[BaseException | None] = []

    def waits() -> None:
        handle = victim.post_receive(buffer, 1, 3, 0)
        victim.wait(handle, 3.0)

    def sends() -> None:
        with contextlib.suppress(OSError):
            peer.sendall(frames)
            peer.shutdown(socket.SHUT_WR)

    begin = time.monotonic()
    errors = at_once(waits, sends)
    assert time.monotonic() - begin < 4.5, "it hangs"
    assert errors[1] is None
    assert errors[0] is None or isinstance(errors[0], TransportError), repr(errors[0])
    return "" if errors[0] is None else str(errors[0])


PAYLOAD = pack_header(DATA, 3, 0, 16) + struct.pack("<4f", 1, 2, 3, 4)
FRAMES: dict[str, tuple[bytes, str]] = {
    "what was asked for": (PAYLOAD, ""),
    "after heartbeats": (pack_header(HEARTBEAT) * 100 + PAYLOAD, ""),
    "after payloads of other exchanges": (
        b"".join(pack_header(DATA, n, 9, 8) + bytes(8) for n in range(200)) + PAYLOAD,
        "",
    ),
    "an unknown kind": (pack_header(max(KINDS) + 1) + PAYLOAD, "a frame that cannot be"),
    "losses of ranks that are not there, where losses end it all": (
        pack_header(LOST, 77) + pack_header(LOST, 1) + pack_header(READY) + PAYLOAD,
        "",
    ),
    "kind 0": (bytes(HEADER_BYTES) + PAYLOAD, "a frame that cannot be"),
    "a heartbeat with a payload": (pack_header(HEARTBEAT, 0, 0, 5) + PAYLOAD, "frame that cannot"),
    "a goodbye with a payload": (pack_header(GOODBYE, 0, 0, 5) + PAYLOAD, "it left"),
    "a goodbye that blames a rank that is not there": (pack_header(GOODBYE, 77), "it left"),
    "another size": (pack_header(DATA, 3, 0, 20) + bytes(20), "20 bytes, and 16 were expected"),
    "the largest size": (pack_header(DATA, 3, 0, 2**32 - 1), "bytes, and 16 were expected"),
    "half a payload": (PAYLOAD[:-3], "closed the connection"),
    "half a header": (PAYLOAD[:5], "closed the connection"),
    "nothing": (b"", "closed the connection"),
    "early payloads beyond the limit": (
        pack_header(DATA, 9, 0, 2**32 - 1),
        "bytes that nobody asked for",
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str) -> None:
    frames, expected = FRAMES[name]
    with victim_and_peer() as (victim, peer):
        text = outcome(victim, frames, peer)
        assert (text == "") == (expected == "") and expected in text, text


def _mutated_frames(seeds: range) -> None:
    """Frames in which some bytes are others: right, or one error of the transport."""
    right = 0
    for seed in seeds:
        chance = random.Random(seed)
        parts = [
            pack_header(HEARTBEAT),
            pack_header(DATA, chance.randrange(8), chance.randrange(3), 8) + bytes(8),
            pack_header(HEARTBEAT),
            PAYLOAD,
            pack_header(DATA, 5, 1, 12) + bytes(12),
        ]
        frames = bytearray(b"".join(parts))
        for _ in range(chance.choice((0, 1, 1, 3))):
            frames[chance.randrange(len(frames))] = chance.randrange(256)
        with victim_and_peer() as (victim, peer):
            right += outcome(victim, bytes(frames), peer) == ""
    assert 0 < right < len(seeds), "both happen"


def test_mutated_frames() -> None:
    _mutated_frames(range(60))


@pytest.mark.slow
def test_many_mutated_frames() -> None:
    _mutated_frames(range(60, 2000))


def test_a_frame_that_comes_a_byte_at_a_time() -> None:
    """Slow, but not silent."""
    with victim_and_peer(silence_s=0.5) as (victim, peer):
        buffer = torch.zeros(4)

        def drip() -> None:
            for byte in PAYLOAD:
                peer.sendall(bytes([byte]))
                time.sleep(0.05)

        handle = victim.post_receive(buffer, 1, 3, 0)
        assert at_once(lambda: victim.wait(handle, 10), drip) == [None, None]
        assert buffer.tolist() == [1, 2, 3, 4]


def test_memory_is_not_taken_on_a_header_s_word() -> None:
    """One that announces as much as may come early, and sends nothing of it."""
    with victim_and_peer() as (victim, peer):
        before = resident_kb()
        peer.sendall(pack_header(DATA, 9, 0, 1 << 30))
        with pytest.raises(PeerLostError, match="said nothing"):
            victim.wait(victim.post_receive(torch.zeros(4), 1, 3, 0), 10)
        assert resident_kb() - before < 50_000


def test_small_payloads_that_nobody_asked_for_are_bounded() -> None:
    """What holds a payload of one byte is more than a byte."""
    with victim_and_peer() as (victim, peer):
        channel = victim._channels[1]
        frames = b"".join(pack_header(DATA, n, 9, 1) + b"x" for n in range(1000))
        outcome(victim, frames, peer)
        assert channel._early_bytes >= 1000 * 200


def test_a_peer_that_never_stops_does_not_stop_the_clock() -> None:
    with victim_and_peer() as (victim, peer):
        stop = threading.Event()

        def endless() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    peer.sendall(pack_header(HEARTBEAT) * 5000)

        thread = threading.Thread(target=endless)
        thread.start()
        begin = time.monotonic()
        try:
            with pytest.raises(TransportError):
                victim.wait(victim.post_receive(torch.zeros(4), 1, 3, 0), 1.0)
            assert time.monotonic() - begin < 5
        finally:
            stop.set()
            victim.close()
            thread.join()
