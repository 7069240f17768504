"""Round trips over one plain TCP connection, with a pause before each. Run by its path.

Nothing but the standard library, so that a process that measures starts in milliseconds:

    python ping.py listen ADDRESS            prints the port, serves one connection, ends with it
    python ping.py connect ADDRESS PORT ...  prints a JSON list of `RoundTrips`

A message is 8 bytes that say how many follow, and these; the answer is one byte, sent when all are
there. So a round trip is the message's time one way and a small answer's time back. The pause
before each lets the token buckets on the way refill, as they do while a node computes.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

HEADER_BYTES = 8
LARGEST_BYTES = 1 << 28
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RoundTrips:
    """Timed round trips of one size.

    Attributes:
        bytes: of a message, its header included.
        seconds: of each round trip, in the order of measuring; empty if the size was left out
            because a message takes, or was expected to take, longer than `longest_s`.
        expected_s: of the untimed message before, or, where there was none because it would have
            taken too long, by the sizes before.
    """

    bytes: int
    seconds: tuple[float, ...]
    expected_s: float


def listen(address: str, timeout_s: float) -> None:
    """Print a free port of `address`, take one connection, answer until the other side closes it.

    Raises:
        TimeoutError: nobody connected, or a message stopped halfway, for `timeout_s` seconds.
        ConnectionError: the connection broke, or the other side is no `measure`.
    """
    with socket.create_server((address, 0), backlog=1) as server:
        server.settimeout(timeout_s)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    header = memoryview(bytearray(HEADER_BYTES))
    buffer = memoryview(bytearray(1 << 16))
    while _fill(connection, header):
        (left,) = struct.unpack("<Q", header)
        if left > LARGEST_BYTES:
            raise ConnectionError(f"a message of {left} bytes; at most {LARGEST_BYTES} are served")
        while left:
            part = buffer[: min(left, len(buffer))]
            if not _fill(connection, part):
                raise ConnectionError("the other side closed the connection within a message")
            left -= len(part)
        connection.sendall(b"\0")


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    """Read all of `buffer`; False if the connection was closed before its first byte."""
    have = 0
    while have < len(buffer):
        got = connection.recv_into(buffer[have:])
        if got == 0 and have == 0:
            return False
        if got == 0:
            raise ConnectionError("the other side closed the connection within a message")
        have += got
    return True


def measure(
    address: str,
    port: int,
    sizes: Sequence[int],
    repeats: Sequence[int],
    *,
    gap_s: float,
    longest_s: float,
) -> list[RoundTrips]:
    """Time messages of each size to a `listen` at `address`, after one of that size untimed.

    Args:
        sizes: bytes, header included, rising; at least 8 each.
        repeats: timed messages, of each size.
        gap_s: pause before each message, seconds.
        longest_s: sizes that take longer are left out, seconds.

    Raises:
        OSError: the other side cannot be reached, broke off, or did not answer in time.
    """
    with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S) as connection:
        # An answer later than this is a cut link, not a slow one.
        connection.settimeout(CONNECT_TIMEOUT_S + 10 * longest_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        results: list[RoundTrips] = []
        for size, count in zip(sizes, repeats, strict=True):
            message = struct.pack("<Q", size - HEADER_BYTES) + bytes(size - HEADER_BYTES)
            expected_s = _expected_s(size, results)
            if expected_s <= longest_s:
                expected_s = _round_trip(connection, message, gap_s)
            seconds: tuple[float, ...] = ()
            if expected_s <= longest_s:
                seconds = tuple(_round_trip(connection, message, gap_s) for _ in range(count))
            results.append(RoundTrips(size, seconds, expected_s))
        return results


def _expected_s(size: int, results: Sequence[RoundTrips]) -> float:
    """On along the line through the two sizes before, or in proportion to one left out."""
    if len(results) < 2:
        return 0.0
    before, last = results[-2:]
    if not last.seconds:
        return last.expected_s * size / last.bytes
    last_s, before_s = median(last.seconds), median(before.seconds)
    slope = max(0.0, (last_s - before_s) / (last.bytes - before.bytes))
    return last_s + slope * (size - last.bytes)


def _round_trip(connection: socket.socket, message: bytes, gap_s: float) -> float:
    time.sleep(gap_s)
    begin = time.perf_counter()
    connection.sendall(message)
    if not connection.recv(1):
        raise ConnectionError("the other side closed the connection")
    return time.perf_counter() - begin


def _main() -> None:
    parser = argparse.ArgumentParser()
    modes = parser.add_subparsers(dest="mode", required=True)
    server = modes.add_parser("listen")
    server.add_argument("address")
    server.add_argument("--timeout-s", type=float, default=60.0)
    client = modes.add_parser("connect")
    client.add_argument("address")
    client.add_argument("port", type=int)
    client.add_argument("--sizes", required=True)
    client.add_argument("--repeats", required=True)
    client.add_argument("--gap-s", type=float, required=True)
    client.add_argument("--longest-s", type=float, required=True)
    args = parser.parse_args()
    if args.mode == "listen":
        listen(args.address, args.timeout_s)
        return
    sizes, repeats = (
        [int(number) for number in text.split(",")] for text in (args.sizes, args.repeats)
    )
    results = measure(
        args.address, args.port, sizes, repeats, gap_s=args.gap_s, longest_s=args.longest_s
    )
    json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    try:
        _main()
    except OSError as error:
        sys.exit(f"ping: {error}")
