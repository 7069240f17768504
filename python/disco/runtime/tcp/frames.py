"""What goes over a connection after the handshake: a header of 12 bytes, then the payload."""

from __future__ import annotations

import struct
from typing import NamedTuple

# kind, nothing, exchange, request, bytes of payload; little-endian.
_HEADER = struct.Struct("<BBHII")
HEADER_BYTES = _HEADER.size

DATA = 1  # a payload of (request, exchange)
HEARTBEAT = 2  # alive; no payload
GOODBYE = 3  # the peer leaves; exchange: one more than the rank it has lost, or 0; no payload
LOST = 4  # exchange: the rank that the peer has lost, without leaving; no payload
READY = 5  # the peer is back, and connected to all who are there; no payload
KINDS = (DATA, HEARTBEAT, GOODBYE, LOST, READY)

MOST_EXCHANGES = 1 << 16
# Above these are messages between requests, with numbers of their own.
FIRST_CALL_EXCHANGE = MOST_EXCHANGES - 16
_REQUESTS = 1 << 32
MOST_PAYLOAD_BYTES = (1 << 32) - 1


class Header(NamedTuple):
    """A frame's header. Requests are counted modulo 2**32."""

    kind: int
    exchange: int
    request: int
    num_bytes: int


def pack_header(kind: int, exchange: int = 0, request: int = 0, num_bytes: int = 0) -> bytes:
    """A header as it goes over the wire."""
    return _HEADER.pack(kind, 0, exchange, request % _REQUESTS, num_bytes)


def unpack_header(data: bytes | bytearray) -> Header:
    """The inverse."""
    kind, _, exchange, request, num_bytes = _HEADER.unpack(data)
    return Header(kind, exchange, request, num_bytes)


def key_of(exchange: int, request: int) -> int:
    """A payload's address between two ranks, as one number."""
    return (request % _REQUESTS) * MOST_EXCHANGES + exchange
