"""Who may meet over TLS: strangers, other authorities, other ranks, ranks without."""

from __future__ import annotations

import contextlib
import datetime
import logging
import random
import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cryptography", reason="needs the extra `tls`")

from disco.errors import InputError, TransportError
from disco.runtime.authority import Authority
from disco.runtime.tcp import Meeting
from disco.runtime.tcp.handshake import MAGIC
from disco.runtime.tcp.tls import Tls, _context
from tests.runtime.at_once import at_once
from tests.runtime.test_keys import days, write
from tests.runtime.tls_cluster import HOST, Ranks, keys_for, load_all


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> list[Tls]:
    return load_all(keys_for(tmp_path_factory.mktemp("keys") / "keys", 3), 3)


def unchecked(folder: Path, rank: int) -> Tls:
    """As `Tls.load`, without what it refuses."""
    contexts = [
        _context(folder, kind) for kind in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
    ]
    return Tls(rank, "", *contexts)


# Strangers ----------------------------------------------------------------------------------------


def _client_hello() -> bytes:
    out = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


def test_strangers_do_not_keep_ranks_from_meeting(tls: list[Tls]) -> None:
    """Garbage, silence, half a handshake, a whole one without a certificate, and a flood."""
    ranks = Ranks(tls, meeting_s=30.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    strangers: list[socket.socket] = []
    stop = threading.Event()
    hello = _client_hello()
    rng = random.Random(0)

    def flood() -> None:
        number = 0
        while not stop.is_set():
            for address in ranks.addresses:
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(address, timeout=0.2)
                    strangers.append(sock)
                    kind = number % 6
                    if kind == 0:
                        sock.sendall(rng.randbytes(300))
                    elif kind == 1:
                        sock.sendall(hello[: rng.randrange(1, len(hello))])  # then silence
                    elif kind == 2:
                        sock.sendall(hello)  # and nothing more
                    elif kind == 3:
                        sock.sendall(b"\x16\x03\x01\xff\xff" + bytes(1000))
                    elif kind == 4:
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
    a, _, c = ranks.transports
    buffer = torch.empty(4)
    handle = a.post_receive(buffer, 2, 0, 0)
    c.send(torch.ones(4), 0, 0, 0)
    a.wait(handle, 5)
    assert torch.equal(buffer, torch.ones(4))
    for sock in strangers:
        sock.close()
    # Three connections of two ends each, a listener a rank less.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    ranks.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_silence_in_the_middle_of_tls_does_not_make_a_rank_spin(
    tls: list[Tls], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that connected, and of one that was dialled."""
    ranks = Ranks(tls[:2], meeting_s=1.5)
    turns: list[float] = []
    turn = Meeting._turn

    def counted(self: Meeting, most_s: float) -> bool:
        turns.append(time.monotonic())
        return turn(self, most_s)

    monkeypatch.setattr(Meeting, "_turn", counted)
    with socket.create_server((HOST, 0)) as silent, socket.socket() as sock:
        sock.connect(ranks.addresses[0])
        ranks.addresses[0] = silent.getsockname()
        sock.sendall(_client_hello())
        (error,) = ranks.connect([rank])
    assert isinstance(error, TransportError)
    assert 0 < len(turns) < 100, "a turn takes 50 ms when nothing happens"
    ranks.close()


def test_without_a_certificate_nobody_gets_to_the_token(tls: list[Tls]) -> None:
    ranks = Ranks(tls[:2], meeting_s=2.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answers: list[object] = []

    def dial() -> None:
        with (
            socket.create_connection(ranks.addresses[0], timeout=3) as sock,
            context.wrap_socket(sock) as secured,
        ):
            try:
                secured.sendall(MAGIC + b"\x01\x00\x00\x00" + b"n" * 32)
                answers.append(secured.recv(100))
            except OSError as error:
                answers.append(error)

    errors = at_once(ranks.transports[0].connect, dial)
    assert isinstance(errors[0], TransportError) and errors[1] is None
    assert "PEER_DID_NOT_RETURN" in str(errors[0]).upper().replace(" ", "_"), errors[0]
    assert isinstance(answers[0], OSError), "it was answered"
    ranks.close()


def test_the_token_is_asked_for_inside(tls: list[Tls]) -> None:
    ranks = Ranks(tls[:2], tokens={1: b"another token, also long"}, meeting_s=1.0)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError) and "another token" in str(errors[1])
    assert isinstance(errors[0], TransportError) and "does not know the token" in str(errors[0])
    ranks.close()


# Ranks that do not fit together -------------------------------------------------------------------


@pytest.mark.parametrize("plain", [0, 1])
def test_all_use_tls_or_none(tls: list[Tls], plain: int, caplog: pytest.LogCaptureFixture) -> None:
    """Both sides say so: the one that dials with its error, the other in its log and its error."""
    ranks = Ranks([None if rank == plain else tls[rank] for rank in range(2)], meeting_s=1.5)
    with caplog.at_level(logging.WARNING):
        errors = ranks.connect()
    texts = {
        True: "it does not use TLS, and this rank does: start all ranks with --tls, or none",
        False: "it uses TLS, and this rank does not: start all ranks with --tls, or none",
    }
    assert isinstance(errors[1], InputError) and texts[plain == 0] in str(errors[1])
    assert str(errors[1]).startswith("rank 0 (")
    assert isinstance(errors[0], TransportError) and texts[plain == 1] in str(errors[0])
    assert texts[plain == 1] in caplog.text
    ranks.close()


@pytest.mark.parametrize("stranger", [0, 1])
def test_another_authority(tls: list[Tls], tmp_path: Path, stranger: int) -> None:
    others = load_all(keys_for(tmp_path / "others", 2), 2)
    ranks = Ranks([others[r] if r == stranger else tls[r] for r in range(2)], meeting_s=1.5)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError), errors
    assert "its certificate is not of this cluster's authority" in str(errors[1])
    assert isinstance(errors[0], TransportError)
    assert "does not take this rank's certificate (unknown ca)" in str(errors[0])
    ranks.close()


def test_whom_the_listener_does_not_trust(tls: list[Tls], tmp_path: Path) -> None:
    """The dialler trusts both authorities, the listener only its own."""
    others = keys_for(tmp_path / "others", 2)
    mine = keys_for(tmp_path / "mine", 2)
    with (others / "rank-1" / "ca.pem").open("ab") as file:
        file.write((mine / "rank-0" / "ca.pem").read_bytes())
    ranks = Ranks([Tls.load(mine / "rank-0", 0), Tls.load(others / "rank-1", 1)], meeting_s=1.5)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError), errors
    assert "it does not take this rank's certificate (unknown ca)" in str(errors[1])
    assert isinstance(errors[0], TransportError)
    assert "its certificate is not of this cluster's authority" in str(errors[0])
    ranks.close()


def test_the_reason_is_read_when_the_listener_has_left(tls: list[Tls], tmp_path: Path) -> None:
    """A dialler is through with TLS before its certificate is looked at, and may be late then."""
    others = keys_for(tmp_path / "others", 2)
    mine = keys_for(tmp_path / "mine", 2)
    with (others / "rank-1" / "ca.pem").open("ab") as file:
        file.write((mine / "rank-0" / "ca.pem").read_bytes())
    with socket.create_server((HOST, 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    dialler = Tls.load(others / "rank-1", 1).dialled(near, HOST, 0)
    listener = Tls.load(mine / "rank-0", 0).accepted(far)
    with pytest.raises(InputError, match="not of this cluster's authority"):
        while True:
            for end in (dialler, listener):
                with contextlib.suppress(BlockingIOError):
                    end.recv(1)
    listener.close()
    time.sleep(0.1)
    with pytest.raises(InputError, match=r"does not take this rank's certificate \(unknown ca\)"):
        for _ in range(5):
            dialler.send(bytes(44))
            time.sleep(0.05)
    dialler.close()


def test_another_ranks_certificate(tls: list[Tls]) -> None:
    """Rank 2's certificate does not let its owner be rank 1."""
    ranks = Ranks([tls[0], replace(tls[2], rank=1), tls[2]], meeting_s=1.5)
    errors = ranks.connect([0, 1])
    assert all(isinstance(error, TransportError) for error in errors), errors
    assert "it says that it is rank 1, and its certificate is of rank 2" in str(errors[0])
    ranks.close()


def test_a_listener_with_another_ranks_certificate(tls: list[Tls]) -> None:
    ranks = Ranks([tls[1], tls[1]], meeting_s=1.5)
    errors = ranks.connect()
    assert isinstance(errors[0], TransportError) and isinstance(errors[1], InputError), errors
    assert "its certificate is of rank 1, and rank 0 should be there" in str(errors[1])
    ranks.close()


@pytest.mark.parametrize("stale", [0, 1])
def test_an_expired_certificate(tmp_path: Path, stale: int) -> None:
    authority = Authority.make(days(-30), days(30))
    ended = replace(authority, end=datetime.datetime.now(datetime.timezone.utc))
    made = []
    for rank in range(2):
        issued = (ended if rank == stale else authority).issue(rank, HOST)
        folder = write(tmp_path / str(rank), authority.pem, issued)
        made.append(unchecked(folder, rank))
    time.sleep(1.1)  # seconds are the smallest unit
    ranks = Ranks(made, meeting_s=1.5)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError) and isinstance(errors[0], TransportError), errors
    texts = ["its certificate has expired", "this rank's certificate (certificate expired)"]
    assert texts[stale == 1] in str(errors[1]) and texts[stale == 0] in str(errors[0])
    ranks.close()


def test_a_certificate_for_another_address(tmp_path: Path) -> None:
    elsewhere = load_all(keys_for(tmp_path / "keys", 2, host="10.9.8.7"), 2)
    ranks = Ranks(elsewhere, meeting_s=1.5)
    errors = ranks.connect()
    assert isinstance(errors[1], InputError)
    assert f"its certificate is not for {HOST}, where the list of peers has it" in str(errors[1])
    ranks.close()
