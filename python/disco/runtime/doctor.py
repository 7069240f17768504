"""Which pairs of nodes can talk, and why others cannot: `disco doctor`, run on all at once."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass

import torch

from disco.errors import TransportError
from disco.runtime.peers import Peers
from disco.runtime.tcp import Identity, Meeting, TcpTransport, listen
from disco.runtime.tcp.handshake import DOCTOR
from disco.runtime.tcp.meeting import name_of
from disco.runtime.tcp.tls import Tls
from disco.runtime.token import read_token

_ROW_BYTES = 1 << 14
_PINGS = 20
_ROWS, _PING, _PONG = 0, 1, 2  # numbers of exchanges


@dataclass(frozen=True)
class Finding:
    """One pair of ranks, `low` < `high`; the higher one connects to the lower one.

    Attributes:
        round_trip_ms: median of a few small messages, None if they cannot talk.
        problem: why they cannot, None if they can.
    """

    low: int
    high: int
    round_trip_ms: float | None
    problem: str | None


@dataclass(frozen=True)
class Report:
    """What the nodes that a doctor runs on have found out about all pairs."""

    peers: Peers
    rank: int
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """True if every pair can talk."""
        return all(finding.problem is None for finding in self.findings)

    def to_json(self) -> list[dict[str, object]]:
        return [asdict(finding) for finding in self.findings]

    def __str__(self) -> str:
        lines = []
        for f in self.findings:
            pair = f"rank {f.high} -> rank {f.low} ({name_of(self.peers(f.low))})"
            if f.problem is None:
                lines.append(f"{pair}: ok, round trip {f.round_trip_ms:.2f} ms")
            else:
                lines.append(f"{pair}: {f.problem}")
        good = sum(f.problem is None for f in self.findings)
        lines.append(f"{good} of {len(self.findings)} pairs can talk, as rank {self.rank} sees it")
        return "\n".join(lines)


def examine(
    peers: Peers,
    rank: int,
    token_file: str | os.PathLike[str] | None,
    timeout_s: float,
    tls: str | os.PathLike[str] | None = None,
) -> Report:
    """Try this node's pairs, and collect what the others found.

    Args:
        peers: of the cluster.
        rank: of this node.
        token_file: None for the variable ``DISCO_TOKEN``.
        timeout_s: how long to try to reach the doctors on the other nodes, in seconds.
        tls: folder with this rank's certificate and key; None goes without TLS.

    Raises:
        InputError: no token, no such rank, keys that cannot be used, or the node's own address
            cannot be listened on.
    """
    peers.check_rank(rank)
    identity = Identity(rank, peers.world_size, "", DOCTOR)
    token = read_token(token_file)
    keys = None if tls is None else Tls.load(tls, rank)
    meeting = Meeting(identity, token, listen(*peers(rank)), peers, strict=False, tls=keys)
    try:
        missing = meeting.attempt(timeout_s)
        transport = TcpTransport(rank, peers.world_size, meeting)
        transport.adopt(meeting.peers)
    finally:
        meeting.close()
    try:
        own = {peer: Finding(*_ordered(rank, peer), None, why) for peer, why in missing.items()}
        for peer in sorted(meeting.peers):
            own[peer] = _ping(transport, peer)
        others = _share(transport, list(own.values()), sorted(meeting.peers))
    finally:
        transport.close()
    return Report(peers, rank, _merge(peers.world_size, list(own.values()), others))


def _ordered(rank: int, peer: int) -> tuple[int, int]:
    return min(rank, peer), max(rank, peer)


def _ping(transport: TcpTransport, peer: int) -> Finding:
    """The lower rank of the pair asks, the higher one answers."""
    low, high = _ordered(transport.rank, peer)
    buffer = torch.zeros(1)
    times = []
    try:
        for number in range(_PINGS):
            begin = time.perf_counter()
            steps = [(_PING, True), (_PONG, False)]
            for exchange, asks in steps:
                if (transport.rank == low) == asks:
                    handle = transport.send(buffer, peer, exchange, number)
                else:
                    handle = transport.post_receive(buffer, peer, exchange, number)
                transport.wait(handle, 10.0)
            times.append((time.perf_counter() - begin) * 1e3)
    except TransportError as error:
        return Finding(low, high, None, str(error))
    return Finding(low, high, sorted(times)[len(times) // 2], None)


def _share(transport: TcpTransport, own: list[Finding], connected: list[int]) -> list[Finding]:
    """The findings of all connected ranks."""
    text = json.dumps([asdict(finding) for finding in own]).encode()[:_ROW_BYTES]
    row = torch.zeros(_ROW_BYTES, dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    found: list[Finding] = []
    for peer in connected:
        theirs = torch.empty_like(row)
        try:
            receive = transport.post_receive(theirs, peer, _ROWS, 0)
            transport.wait(transport.send(row, peer, _ROWS, 0), 10.0)
            transport.wait(receive, 10.0)
            content = theirs.numpy().tobytes().rstrip(b"\0")
            found += [Finding(**item) for item in json.loads(content)]
        except (TransportError, ValueError, TypeError):
            continue  # what it found is unknown
    return found


def _merge(world_size: int, own: list[Finding], others: list[Finding]) -> tuple[Finding, ...]:
    """One finding a pair: of the higher rank, which connects, where it is known."""
    known = {(f.low, f.high): f for f in others}
    known.update({(f.low, f.high): f for f in own})
    unknown = "unknown: no doctor of the two reached this node"
    pairs = [(low, high) for high in range(world_size) for low in range(high)]
    return tuple(known.get(pair, Finding(*pair, None, unknown)) for pair in pairs)
