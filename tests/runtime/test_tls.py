"""TLS between ranks, over sockets of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("cryptography", reason="needs the extra `tls`")

from disco.errors import InputError, PeerLostError, TransportError
from disco.runtime.tcp import TcpTransport
from disco.runtime.tcp.frames import HEADER_BYTES
from disco.runtime.tcp.handshake import MAGIC
from disco.runtime.tcp.tls import Tls
from disco.runtime.tcp.tls_socket import RECORD_BYTES
from tests.runtime.at_once import at_once
from tests.runtime.tls_cluster import TOKEN, Proxy, Ranks, keys_for, load_all

Pair = tuple[TcpTransport, TcpTransport]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> list[Tls]:
    return load_all(keys_for(tmp_path_factory.mktemp("keys") / "keys", 3), 3)


@pytest.fixture
def pair(tls: list[Tls]) -> Iterator[Pair]:
    ranks = Ranks(tls[:2])
    assert ranks.connect() == [None, None]
    yield ranks.transports[0], ranks.transports[1]
    ranks.close()


# Payloads -----------------------------------------------------------------------------------------


def test_version_and_cipher(pair: Pair) -> None:
    for transport in pair:
        (channel,) = transport._channels.values()
        assert channel.stream._tls.version() == "TLSv1.3"
        assert channel.stream.certified_rank == 1 - transport.rank


def test_payloads_of_all_sizes_around_a_record(pair: Pair) -> None:
    a, b = pair
    edge = RECORD_BYTES - HEADER_BYTES
    sizes = [1, 2, 11, 12, 13, edge - 1, edge, edge + 1, RECORD_BYTES, RECORD_BYTES + 1]
    sizes += [edge + RECORD_BYTES - 1, edge + RECORD_BYTES, edge + RECORD_BYTES + 1, 300_007]
    payloads = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    buffers = [torch.empty_like(payload) for payload in payloads]
    receives = [b.post_receive(buffer, 0, n, 0) for n, buffer in enumerate(buffers) if n % 2]
    sends = [a.send(payload, 1, n, 0) for n, payload in enumerate(payloads)]
    assert at_once(
        lambda: [a.wait(send, 10) for send in sends],
        lambda: [b.wait(receive, 10) for receive in receives],
    ) == [None, None]
    early = [b.post_receive(buffer, 0, n, 0) for n, buffer in enumerate(buffers) if not n % 2]
    for receive in early:
        b.wait(receive, 10)
    assert all(map(torch.equal, buffers, payloads))
    assert a.bytes_sent == b.bytes_received == sum(sizes), "payload bytes, as without TLS"


@pytest.mark.parametrize("world_size", [2, 3])
def test_large_payloads_cross(tls: list[Tls], world_size: int) -> None:
    """Every rank sends every other more than sockets hold, in two payloads, and then receives."""
    ranks = Ranks(tls[:world_size])
    assert set(ranks.connect()) == {None}
    numel = 1_500_001

    def talk(rank: int) -> None:
        mine = ranks.transports[rank]
        peers = [peer for peer in range(world_size) if peer != rank]
        keys = [(peer, number) for number in range(2) for peer in peers]
        buffers = {key: torch.empty(numel) for key in keys}
        handles = [mine.post_receive(buffers[p, n], p, n, 9) for p, n in keys]
        sent = torch.arange(numel) + float(rank)
        handles += [mine.send(sent * (n + 1), p, n, 9) for p, n in keys]
        assert not all(handle.done for handle in handles), "sockets hold it all: make it larger"
        for handle in handles:
            mine.wait(handle, 30)
        for p, n in keys:
            assert torch.equal(buffers[p, n], (torch.arange(numel) + float(p)) * (n + 1))
        assert mine.bytes_sent == mine.bytes_received == 4 * numel * len(keys)

    assert at_once(*(lambda r=r: talk(r) for r in range(world_size))) == [None] * world_size
    ranks.close()


def test_what_tls_has_decrypted_already_is_not_waited_for(tls: list[Tls]) -> None:
    """With two peers a rank polls: what TLS holds of a record, poll knows nothing of."""
    ranks = Ranks(tls)
    assert set(ranks.connect()) == {None}
    a, b, _ = ranks.transports
    for number in range(50):
        b.send(torch.full((1 + number * 100,), float(number)), 0, number, 0)
    time.sleep(0.2)
    for number in reversed(range(50)):
        buffer = torch.empty(1 + number * 100)
        a.wait(a.post_receive(buffer, 1, number, 0), 1)
        assert (buffer == number).all()
    ranks.close()


# Losing peers -------------------------------------------------------------------------------------


def test_a_closed_peer_is_lost_at_once(pair: Pair) -> None:
    a, b = pair
    handle = a.post_receive(torch.empty(4), 1, 2, 0)
    b.close()
    b.close()
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 .* it left, while exchange 2 waited"):
        a.wait(handle, 5)
    assert time.monotonic() - begin < 1
    with pytest.raises(TransportError, match="the transport of rank 1 is closed"):
        b.send(torch.zeros(1), 0, 0, 0)


def test_a_silent_peer_is_lost(tls: list[Tls]) -> None:
    ranks = Ranks(tls[:2], silence_s=0.6)
    assert ranks.connect() == [None, None]
    a = ranks.transports[0]
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"rank 1 \(.*\) is lost: it has said nothing"):
        a.wait(a.post_receive(torch.empty(4), 1, 5, 0), 30)
    assert 0.6 <= time.monotonic() - begin < 2
    ranks.close()


def test_a_cut_connection_is_no_end(tls: list[Tls]) -> None:
    """Somebody who closes the connection between two ranks does not look like one that left."""
    ranks = Ranks(tls[:2])
    with Proxy(ranks.addresses[0]) as proxy:
        ranks.addresses[0] = proxy.address
        assert ranks.connect() == [None, None]
        a, b = ranks.transports
        handle = a.post_receive(torch.empty(4), 1, 2, 0)
        proxy.cut.set()
        for waiter, waits in ((a, handle), (b, None)):
            waits = waits or b.post_receive(torch.empty(4), 0, 2, 0)
            with pytest.raises(PeerLostError, match="it closed the connection|Connection reset"):
                waiter.wait(waits, 5)
            assert not any(channel.finished for channel in waiter._channels.values())
    ranks.close()


# Who reads and who writes on the way --------------------------------------------------------------


def _talk(ranks: Ranks, payload: torch.Tensor) -> torch.Tensor:
    """Rank 1 sends it to rank 0, and gets twice that back."""
    a, b = ranks.transports
    there, back = torch.empty_like(payload), torch.empty_like(payload)

    def lower() -> None:
        a.wait(a.post_receive(there, 1, 0, 0), 10)
        a.wait(a.send(there * 2, 1, 1, 0), 10)

    def higher() -> None:
        receive = b.post_receive(back, 0, 1, 0)
        b.wait(b.send(payload, 0, 0, 0), 10)
        b.wait(receive, 10)

    assert at_once(lower, higher) == [None, None]
    assert torch.equal(there, payload)
    return back


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_recording_has_neither_token_nor_activations(tls: list[Tls], encrypted: bool) -> None:
    """Without TLS the same recording has the activations, so this would notice them."""
    ranks = Ranks(tls[:2] if encrypted else [None, None])
    payload = torch.randn(50_000)
    with Proxy(ranks.addresses[0]) as proxy:
        ranks.addresses[0] = proxy.address
        assert ranks.connect() == [None, None]
        back = _talk(ranks, payload)
        assert torch.equal(back, payload * 2)
        up, down = (bytes(proxy.passed[way]) for way in (True, False))
        ranks.close()
    assert len(up) > payload.nbytes and len(down) > payload.nbytes
    parts = [payload.numpy().tobytes()[i : i + 16] for i in range(0, payload.nbytes, 1000)]
    seen = sum(part in up for part in parts)
    assert seen == (0 if encrypted else len(parts))
    assert TOKEN not in up + down
    for text in (MAGIC, b"world_size", b"disco rank", b"disco-rank"):
        assert encrypted == (text not in up + down) or text.startswith(b"disco"), text


# Where bytes are changed: offsets after the handshake, in the direction of the payload. The first
# five are a record's header, the last ones of a record belong to its tag.
@pytest.mark.parametrize("offset", [0, 2, 3, 4, 5, 17, 1000, RECORD_BYTES + 20, 60_000])
@pytest.mark.parametrize("up", [True, False])
def test_a_changed_byte_is_a_lost_peer_and_never_a_wrong_number(
    tls: list[Tls], offset: int, up: bool
) -> None:
    ranks = Ranks(tls[:2], silence_s=1.0)
    armed: list[int] = []

    def flip(data: bytes, way: bool, before: int) -> bytes:
        at = armed[0] + offset - before if armed else -1
        if way != up or not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    with Proxy(ranks.addresses[0], flip) as proxy:
        ranks.addresses[0] = proxy.address
        assert ranks.connect() == [None, None]
        time.sleep(0.1)
        armed.append(len(proxy.passed[up]))
        a, b = ranks.transports
        sender, receiver = (b, a) if up else (a, b)
        payload = torch.arange(20_000.0)
        got = torch.zeros_like(payload)

        def receive() -> None:
            receiver.wait(receiver.post_receive(got, sender.rank, 0, 0), 10)

        def send() -> None:
            sender.wait(sender.send(payload, receiver.rank, 0, 0), 10)
            with contextlib.suppress(PeerLostError):  # the other one may have ended it
                sender.wait(sender.post_receive(torch.empty(1), receiver.rank, 1, 0), 3)

        errors = at_once(receive, send)
        assert isinstance(errors[0], PeerLostError), errors
        assert errors[0].rank == sender.rank
        # What was written is a true beginning: each record was verified before.
        whole = int((got != payload).nonzero()[0])
        assert torch.equal(got[:whole], payload[:whole]) and not got[whole + 1 :].any()
        ranks.close()


def test_a_record_that_comes_twice_is_a_lost_peer(tls: list[Tls]) -> None:
    ranks = Ranks(tls[:2])
    armed = threading.Event()

    def again(data: bytes, way: bool, before: int) -> bytes:
        return data + data if armed.is_set() and way else data

    with Proxy(ranks.addresses[0], again) as proxy:
        ranks.addresses[0] = proxy.address
        assert ranks.connect() == [None, None]
        time.sleep(0.1)
        armed.set()
        a, b = ranks.transports
        buffer = torch.empty(4)
        b.send(torch.ones(4), 0, 0, 0)
        with contextlib.suppress(PeerLostError):
            a.wait(a.post_receive(buffer, 1, 0, 0), 5)
            assert torch.equal(buffer, torch.ones(4))
        with pytest.raises(PeerLostError, match="changed on the way"):
            a.wait(a.post_receive(buffer, 1, 1, 0), 5)
        ranks.close()


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("offset", [0, 3, 11, 60, 300, 900])
def test_a_byte_changed_while_they_meet(tls: list[Tls], offset: int, up: bool) -> None:
    """The connection fails, and the next one, which nobody changes, does not."""
    ranks = Ranks(tls[:2], meeting_s=20.0)
    done = threading.Event()

    def flip(data: bytes, way: bool, before: int) -> bytes:
        at = offset - before
        if way != up or done.is_set() or not 0 <= at < len(data):
            return data
        done.set()
        return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]

    with Proxy(ranks.addresses[0], flip) as proxy:
        ranks.addresses[0] = proxy.address
        errors = ranks.connect()
        assert done.is_set()
        if errors == [None, None]:
            assert torch.equal(_talk(ranks, torch.ones(7)), torch.full((7,), 2.0))
        else:  # a certificate that has been changed is an error of its own
            assert isinstance(errors[1], InputError) and "certificate" in str(errors[1])
        ranks.close()
