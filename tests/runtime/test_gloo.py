"""The gloo transport alone: two ranks in two threads of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disco.errors import DeadlineError, InputError, TransportError
from disco.runtime.gloo import GlooTransport
from disco.runtime.rendezvous import agree, file_store
from tests.runtime.at_once import at_once

Pair = tuple[GlooTransport, GlooTransport]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = [
        GlooTransport(rank, 2, file_store(str(tmp_path / "store"), 2), timeout_s=5)
        for rank in range(2)
    ]
    assert at_once(*(transport.connect for transport in made)) == [None, None]
    yield made[0], made[1]
    for transport in made:
        transport.close()


def test_payloads_find_their_buffers_in_any_order(pair: Pair) -> None:
    a, b = pair
    payloads = {
        (request, exchange): torch.full((3, 5), 10.0 * request + exchange)
        for request in (0, 1, 1 << 15, (1 << 15) + 1)  # the tag wraps: the last two look like 0, 1
        for exchange in (0, 7, 65535)
    }
    for first in (0, 1 << 15):
        keys = [key for key in payloads if key[0] in (first, first + 1)]
        buffers = {key: torch.empty(3, 5) for key in keys}
        receives = {
            key: b.post_receive(buffers[key], 0, exchange=key[1], request=key[0]) for key in keys
        }
        sends = [a.send(payloads[key], 1, key[1], key[0]) for key in reversed(keys)]
        for key, handle in receives.items():
            b.wait(handle, 5)
            assert handle.done
            assert torch.equal(buffers[key], payloads[key]), key
        for send in sends:
            a.wait(send, 5)


def test_counts_payload_bytes_of_every_dtype(pair: Pair) -> None:
    a, b = pair
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64)
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
    assert (b.bytes_sent, a.bytes_received) == (total, total) == (7 * 17, 7 * 17)
    assert (a.bytes_sent, b.bytes_received) == (0, 0)


def test_an_empty_payload_is_no_message(pair: Pair) -> None:
    a, b = pair
    assert a.post_receive(torch.empty(0, 4), 1, 0, 0).done
    assert b.send(torch.empty(0, 4), 0, 0, 0).done
    assert b.bytes_sent == 0


def test_a_deadline_is_kept_and_ends_the_connection(pair: Pair) -> None:
    a, _ = pair
    handle = a.post_receive(torch.empty(4), 1, 0, 0)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match="rank 0 failed receiving from rank 1: Timed out"):
        a.wait(handle, 0.2)
    assert 0.1 < time.monotonic() - begin < 3
    with pytest.raises(TransportError, match="failed receiving from rank 1"):
        a.send(torch.zeros(1), 1, 1, 0)


def test_a_closed_peer_is_an_error(pair: Pair) -> None:
    a, b = pair
    handle = a.post_receive(torch.empty(4), 1, 0, 0)
    b.close()
    with pytest.raises(TransportError, match="rank 1"):
        a.wait(handle, 5)


def test_listens_on_loopback_only(pair: Pair) -> None:
    listening = []
    for table in ("tcp", "tcp6"):
        rows = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        listening += [row.split() for row in rows if row.split()[3] == "0A"]
    mine = {
        Path(link).readlink().name
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink() and str(Path(link).readlink()).startswith("socket:")
    }
    addresses = [row[1].split(":")[0] for row in listening if f"socket:[{row[9]}]" in mine]
    assert len(addresses) == 2, "one listening socket per rank"
    assert set(addresses) == {"0100007F"}


def test_ranks_of_different_plans_refuse_each_other(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    errors = at_once(
        lambda: agree(file_store(store, 2), 0, 2, "a" * 64, 5),
        lambda: agree(file_store(store, 2), 1, 2, "b" * 64, 5),
    )
    for error in errors:
        assert isinstance(error, InputError)
        assert "aaaaaaaaaaaa" in str(error) and "bbbbbbbbbbbb" in str(error)


def test_ranks_of_another_world_size_refuse_each_other(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    errors = at_once(
        lambda: agree(file_store(store, 2), 0, 2, "a" * 64, 5),
        lambda: agree(file_store(store, 2), 1, 3, "a" * 64, 1),
    )
    assert all(isinstance(error, InputError) for error in errors), errors


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"rank 1 of 2 did not appear within 0\.3 s"):
        agree(file_store(str(tmp_path / "store"), 2), 0, 2, "a" * 64, 0.3)
