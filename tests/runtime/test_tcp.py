"""The tcp transport alone: ranks in threads of this process."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from disco.errors import DeadlineError, InputError, PeerLostError, TransportError
from disco.runtime.tcp import Identity, Meeting, TcpTransport, listen
from disco.runtime.tcp.frames import DATA, pack_header
from tests.runtime.at_once import at_once

TOKEN = b"a token for tests, long enough"


class Ranks:
    """Transports of one cluster that have not met yet; `changes` makes some ranks differ."""

    def __init__(
        self,
        world_size: int,
        *,
        changes: dict[int, dict[str, Any]] | None = None,
        tokens: dict[int, bytes] | None = None,
        meeting_s: float = 10.0,
        silence_s: float = 5.0,
    ) -> None:
        self.listeners = [listen("127.0.0.1") for _ in range(world_size)]
        self.addresses = [listener.getsockname()[:2] for listener in self.listeners]
        identities = [Identity(rank, world_size, "a" * 64, "1") for rank in range(world_size)]
        for rank, change in (changes or {}).items():
            identities[rank] = replace(identities[rank], **change)
        self.transports = [
            TcpTransport(
                rank,
                world_size,
                Meeting(
                    identities[rank],
                    (tokens or {}).get(rank, TOKEN),
                    self.listeners[rank],
                    self.addresses.__getitem__,
                ),
                meeting_s=meeting_s,
                silence_s=silence_s,
            )
            for rank in range(world_size)
        ]

    def connect(self, ranks: Sequence[int] | None = None) -> list[BaseException | None]:
        members = range(len(self.transports)) if ranks is None else ranks
        return at_once(*(self.transports[rank].connect for rank in members))

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


@pytest.fixture
def pair() -> Iterator[tuple[TcpTransport, TcpTransport]]:
    ranks = Ranks(2)
    assert ranks.connect() == [None, None]
    yield ranks.transports[0], ranks.transports[1]
    ranks.close()


Pair = tuple[TcpTransport, TcpTransport]


def test_payloads_find_their_buffers_in_any_order(pair: Pair) -> None:
    a, b = pair
    keys = [(request, exchange) for request in (0, 1, 2**32) for exchange in (0, 7, 65535)]
    del keys[-3:]  # 2**32 looks like 0, which is long over by then
    payloads = {key: torch.full((3, 5), 10.0 * key[0] + key[1]) for key in keys}
    buffers = {key: torch.empty(3, 5) for key in keys}
    before = keys[::2]  # the others are sent before anybody asks for them
    receives = {key: b.post_receive(buffers[key], 0, key[1], key[0]) for key in before}
    sends = [a.send(payloads[key], 1, key[1], key[0]) for key in reversed(keys)]
    for send in sends:
        a.wait(send, 5)
    time.sleep(0.05)
    b.progress()
    receives |= {key: b.post_receive(buffers[key], 0, key[1], key[0]) for key in keys[1::2]}
    for key, handle in receives.items():
        b.wait(handle, 5)
        assert handle.done and torch.equal(buffers[key], payloads[key]), key


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_large_payloads_cross(world_size: int) -> None:
    """Every rank sends every other more than sockets hold, and then receives: nobody blocks."""
    ranks = Ranks(world_size)
    assert set(ranks.connect()) == {None}
    numel = 4_000_000

    def talk(rank: int) -> None:
        mine = ranks.transports[rank]
        peers = [peer for peer in range(world_size) if peer != rank]
        buffers = {peer: torch.empty(numel) for peer in peers}
        handles = [mine.post_receive(buffers[peer], peer, 3, 9) for peer in peers]
        sent = torch.arange(numel) + float(rank)
        handles += [mine.send(sent, peer, 3, 9) for peer in peers]
        for handle in handles:
            mine.wait(handle, 20)
        for peer in peers:
            assert torch.equal(buffers[peer], torch.arange(numel) + float(peer))
        assert mine.bytes_sent == mine.bytes_received == len(peers) * 4 * numel

    assert at_once(*(lambda r=r: talk(r) for r in range(world_size))) == [None] * world_size
    ranks.close()


def test_a_payload_that_is_half_there_when_it_is_asked_for(pair: Pair) -> None:
    a, b = pair
    sent = torch.arange(3_000_000, dtype=torch.int64)
    send = a.send(sent, 1, 0, 0)
    assert not send.done, "sockets hold it all: make it larger"
    time.sleep(0.05)
    b.progress()  # takes what is there, into memory of the transport
    buffer = torch.empty_like(sent)
    receive = b.post_receive(buffer, 0, 0, 0)
    errors = at_once(lambda: a.wait(send, 10), lambda: b.wait(receive, 10))
    assert errors == [None, None] and torch.equal(buffer, sent)


def test_counts_payload_bytes_of_every_dtype(pair: Pair) -> None:
    a, b = pair
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
    total = 0
    for number, dtype in enumerate(dtypes):
        sent = torch.arange(7).to(dtype)
        buffer = torch.empty_like(sent)
        receive = a.post_receive(buffer, 1, exchange=number, request=0)
        send = b.send(sent, 0, number, 0)
        a.wait(receive, 5)
        b.wait(send, 5)
        assert torch.equal(buffer, sent)
        total += sent.nbytes
    assert (b.bytes_sent, a.bytes_received) == (total, total)
    assert (a.bytes_sent, b.bytes_received) == (0, 0)


def test_an_empty_payload_is_no_message(pair: Pair) -> None:
    a, b = pair
    assert a.post_receive(torch.empty(0, 4), 1, 0, 0).done
    assert b.send(torch.empty(0, 4), 0, 0, 0).done
    assert b.bytes_sent == 0


def test_wait_any_returns_with_the_first(pair: Pair) -> None:
    a, b = pair
    buffers = [torch.empty(4), torch.empty(4)]
    handles = [b.post_receive(buffers[n], 0, n, 0) for n in range(2)]
    a.send(torch.ones(4), 1, 1, 0)
    b.wait_any(handles, 5)
    assert [handle.done for handle in handles] == [False, True]


def test_a_deadline_is_kept_while_the_peer_is_alive(pair: Pair) -> None:
    a, b = pair
    handle = a.post_receive(torch.empty(4), 1, 5, 0)
    stop = threading.Event()

    def computes() -> None:
        while not stop.wait(0.05):
            b.progress()

    thread = threading.Thread(target=computes)
    thread.start()
    try:
        begin = time.monotonic()
        with pytest.raises(DeadlineError, match=r"rank 0 waited 0\.4 s for exchange 5 with rank 1"):
            a.wait(handle, 0.4)
        assert 0.4 <= time.monotonic() - begin < 1.0
    finally:
        stop.set()
        thread.join()


def test_a_silent_peer_is_lost() -> None:
    ranks = Ranks(2, silence_s=0.6)
    assert ranks.connect() == [None, None]
    a = ranks.transports[0]
    handle = a.post_receive(torch.empty(4), 1, 5, 0)
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"rank 1 \(.*\) is lost: it has said nothing") as lost:
        a.wait(handle, 30)
    assert 0.6 <= time.monotonic() - begin < 1.5
    assert (lost.value.rank, lost.value.exchange) == (1, 5)
    assert lost.value.host.startswith("127.0.0.1:")
    with pytest.raises(PeerLostError, match="rank 1"):
        a.send(torch.zeros(1), 1, 1, 0)
    ranks.close()


def test_a_peer_that_only_waits_is_not_silent() -> None:
    """Its heartbeats tell: a long wait for somebody else does not look like its end."""
    ranks = Ranks(3, silence_s=0.8)
    assert ranks.connect() == [None] * 3
    a, b, c = ranks.transports

    def slow() -> None:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            time.sleep(0.02)
            c.progress()  # computes
        c.wait(c.send(torch.full((4,), 7.0), 1, 0, 0), 5)

    def middle() -> None:
        buffer = torch.empty(4)
        b.wait(b.post_receive(buffer, 2, 0, 0), 10)
        b.wait(b.send(buffer, 0, 1, 0), 5)

    def last() -> None:
        buffer = torch.empty(4)
        a.wait(a.post_receive(buffer, 1, 1, 0), 10)
        assert buffer[0] == 7

    assert at_once(last, middle, slow) == [None] * 3
    ranks.close()


def test_a_closed_peer_is_lost_at_once(pair: Pair) -> None:
    a, b = pair
    handle = a.post_receive(torch.empty(4), 1, 2, 0)
    b.close()
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 .* it left, while exchange 2 waited"):
        a.wait(handle, 5)
    assert time.monotonic() - begin < 1
    with pytest.raises(TransportError, match="the transport of rank 1 is closed"):
        b.send(torch.zeros(1), 0, 0, 0)


def test_what_came_before_the_peer_left_counts(pair: Pair) -> None:
    a, b = pair
    b.wait(b.send(torch.full((4,), 3.0), 0, 2, 0), 5)
    b.close()
    time.sleep(0.1)
    a.progress()
    buffer = torch.empty(4)
    handle = a.post_receive(buffer, 1, 2, 0)
    assert handle.done and torch.equal(buffer, torch.full((4,), 3.0))
    with pytest.raises(PeerLostError, match="it left, while exchange 3 waited"):
        a.post_receive(buffer, 1, 3, 0)


def test_a_peer_that_has_finished_does_not_end_the_others() -> None:
    ranks = Ranks(3)
    assert ranks.connect() == [None] * 3
    a, b, c = ranks.transports
    b.close()

    def late() -> None:
        time.sleep(0.4)
        c.wait(c.send(torch.ones(2), 0, 0, 0), 5)

    buffer = torch.empty(2)
    worked = time.process_time()
    assert at_once(lambda: a.wait(a.post_receive(buffer, 2, 0, 0), 5), late) == [None, None]
    assert torch.equal(buffer, torch.ones(2))
    assert time.process_time() - worked < 0.2, "it spins while it waits"
    ranks.close()


def test_who_was_lost_first_is_named_to_all() -> None:
    """Rank 0 waits for rank 1, which waits for rank 2, which is gone without a word."""
    ranks = Ranks(3, silence_s=0.5)
    assert ranks.connect() == [None] * 3
    a, b, _ = ranks.transports

    def middle() -> None:
        try:
            b.wait(b.post_receive(torch.empty(1), 2, 0, 0), 10)
        finally:
            b.close()

    errors = at_once(lambda: a.wait(a.post_receive(torch.empty(1), 1, 0, 0), 10), middle)
    assert [type(error) for error in errors] == [PeerLostError] * 2
    assert [error.rank for error in errors if isinstance(error, PeerLostError)] == [2, 2]
    assert "rank 1" in str(errors[0]) and "has lost it" in str(errors[0])
    ranks.close()


def test_payloads_of_another_size_are_an_error(pair: Pair) -> None:
    a, b = pair
    handle = a.post_receive(torch.empty(4), 1, 6, 0)
    b.send(torch.zeros(5), 0, 6, 0)
    with pytest.raises(PeerLostError, match="exchange 6 has 20 bytes, and 16 were expected"):
        a.wait(handle, 5)


def test_a_message_that_no_header_can_tell_is_refused(pair: Pair) -> None:
    huge = torch.empty(2**32, dtype=torch.uint8)  # never touched, so it takes no memory
    with pytest.raises(TransportError, match="4294967296 bytes to rank 1 .* up to 4294967295"):
        pair[0].send(huge, 1, 0, 0)


def test_cuda_tensors_are_refused(pair: Pair) -> None:
    with pytest.raises(TransportError, match="CPU memory, given one on meta"):
        pair[0].send(torch.zeros(3, device="meta"), 1, 0, 0)


# Meeting ------------------------------------------------------------------------------------------


def test_another_token_is_refused_on_both_sides() -> None:
    ranks = Ranks(2, tokens={1: b"another token, also long"}, meeting_s=1.0)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError) and "another token" in str(errors[1])
    assert isinstance(errors[0], TransportError)
    assert "missed rank 1" in str(errors[0]) and "1 connections were refused" in str(errors[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"plan": "b" * 64},
            "plan (a|b){12} .* plan|of plan (a|b){12}",
        ),
        ({"world_size": 3}, "for 2.*for 3|for 3.*for 2"),
        ({"program": "2"}, "programs of version 2.*version 1|version 1.*version 2"),
    ],
)
def test_ranks_that_differ_refuse_each_other(change: dict[str, Any], message: str) -> None:
    ranks = Ranks(2, changes={1: change}, meeting_s=2.0)
    errors = ranks.connect()
    for error in errors:
        assert isinstance(error, InputError), errors
        assert re.search(message, str(error))
    ranks.close()


def test_two_processes_with_one_rank_are_refused() -> None:
    ranks = Ranks(3, changes={2: {"rank": 1}}, meeting_s=1.0)
    errors = ranks.connect()
    assert any(isinstance(error, InputError) for error in errors), errors
    assert re.search("a rank of its own|two processes say", " ".join(map(str, errors)))
    ranks.close()


def test_a_missing_rank_is_named_with_the_reason() -> None:
    ranks = Ranks(3, meeting_s=0.5)
    ranks.listeners[1].close()
    errors = ranks.connect([0, 2])
    assert all(isinstance(error, TransportError) for error in errors)
    assert "rank 0 of 3 missed rank 1 (it has not connected)" in str(errors[0])
    assert "missed rank 1 (127.0.0.1:" in str(errors[1]) and "refused" in str(errors[1])
    ranks.close()


def test_nobody_can_connect_once_all_are_there(pair: Pair) -> None:
    for transport in pair:
        assert transport._meeting.listener.fileno() == -1


def test_strangers_do_not_keep_ranks_from_meeting() -> None:
    """Garbage, silence, half a handshake and a flood, at every port, before and while they meet."""
    ranks = Ranks(3, meeting_s=20.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    strangers: list[socket.socket] = []
    stop = threading.Event()

    def flood() -> None:
        number = 0
        while not stop.is_set():
            for address in ranks.addresses:
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(address, timeout=0.2)
                    strangers.append(sock)
                    kind = number % 4
                    if kind == 0:
                        sock.sendall(bytes(torch.randint(0, 256, (300,), dtype=torch.uint8)))
                    elif kind == 1:
                        sock.sendall(b"disco\x00tp\x01\x00\x00\x00" + b"n" * 32)  # then silence
                    elif kind == 2:
                        sock.close()
                number += 1
            for sock in strangers[:-60]:
                sock.close()
            del strangers[:-60]

    thread = threading.Thread(target=flood)
    thread.start()
    time.sleep(0.3)
    try:
        assert ranks.connect() == [None] * 3
    finally:
        stop.set()
        thread.join()
    buffer = torch.empty(4)
    handle = ranks.transports[0].post_receive(buffer, 2, 0, 0)
    ranks.transports[2].send(torch.ones(4), 0, 0, 0)
    ranks.transports[0].wait(handle, 5)
    assert torch.equal(buffer, torch.ones(4))
    for sock in strangers:
        sock.close()
    # Three connections of two ends each, a listener a rank less.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    ranks.close()


def test_a_proof_is_worth_nothing_in_another_connection() -> None:
    """Who listens where a rank should be learns nothing that lets it in elsewhere."""
    ranks = Ranks(2, meeting_s=2.0)
    recorded: list[bytes] = []
    false = socket.create_server(("127.0.0.1", 0))
    false.settimeout(5)
    real = ranks.addresses[0]
    ranks.addresses[0] = false.getsockname()

    def record() -> None:
        sock, _ = false.accept()
        sock.settimeout(1)
        hello = sock.recv(1024)
        sock.sendall(b"disco\x00tp\x01\x00\x00\x00" + b"n" * 32)
        recorded.extend([hello, sock.recv(1024)])
        sock.close()

    def replay() -> None:
        while len(recorded) < 2:
            time.sleep(0.01)
        with socket.create_connection(real, timeout=3) as sock:
            sock.sendall(recorded[0])
            sock.recv(44)
            sock.sendall(recorded[1])
            verdict = sock.recv(1024)
            assert verdict[:2] == b"\x01\x00" and not any(verdict[2:]), "it was let in"

    errors = at_once(ranks.transports[0].connect, ranks.transports[1].connect, record, replay)
    assert isinstance(errors[0], TransportError) and isinstance(errors[1], TransportError)
    assert errors[2:] == [None, None]
    assert TOKEN not in b"".join(recorded)
    false.close()
    ranks.close()


def test_a_frame_that_cannot_be_ends_the_connection(pair: Pair) -> None:
    a, b = pair
    sock = b._channels[0].stream
    handle = a.post_receive(torch.empty(4), 1, 0, 0)
    sock.sendmsg([memoryview(pack_header(77, 0, 0, 12))])
    with pytest.raises(PeerLostError, match="a frame that cannot be"):
        a.wait(handle, 5)


def test_more_than_anybody_asked_for_ends_the_connection(pair: Pair) -> None:
    a, b = pair
    sock = b._channels[0].stream
    handle = a.post_receive(torch.empty(4), 1, 0, 0)
    sock.sendmsg([memoryview(pack_header(DATA, 9, 0, 2**31))])
    with pytest.raises(PeerLostError, match="bytes that nobody asked for"):
        a.wait(handle, 5)
