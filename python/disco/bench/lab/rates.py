"""Rates in tc's words, and how a token bucket is sized for one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from disco.errors import InputError

MTU_BYTES = 1500
FRAME_BYTES = MTU_BYTES + 14  # with the Ethernet header, which tc counts
SEGMENT_BYTES = MTU_BYTES - 20 - 20 - 12  # payload of a packet: less IPv4, TCP, time stamps

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", re.IGNORECASE)
_DELAY = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)", re.IGNORECASE)
_LOWEST_BIT_S, _HIGHEST_BIT_S = 10**5, 10**11


def parse_rate(text: str) -> int | None:
    """Bits per second of a rate as tc writes it: `100mbit`, `2.5gbit`; None for `none`.

    Raises:
        InputError: it is no such rate, or outside 100kbit to 100gbit.
    """
    if text.strip().lower() == "none":
        return None
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"a rate is a number and bit, kbit, mbit or gbit (per second), or none, not {text!r}: "
            "for example 100mbit"
        )
    bit_s = round(float(match[1]) * _UNITS[match[2].lower()])
    if not _LOWEST_BIT_S <= bit_s <= _HIGHEST_BIT_S:
        raise InputError(
            f"a rate is from 100kbit to 100gbit, not {text}: give one of these or none"
        )
    return bit_s


def parse_delay(text: str) -> float:
    """Milliseconds of a time as tc writes it: `1ms`, `500us`, `0.2s`.

    Raises:
        InputError: it is no such time.
    """
    match = _DELAY.fullmatch(text.strip())
    if match is None:
        raise InputError(f"a delay is a number and us, ms or s, for example 1ms, not {text!r}")
    return float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[match[2].lower()]


def format_rate(bit_s: int | None) -> str:
    """As `parse_rate` reads it."""
    if bit_s is None:
        return "none"
    for unit in ("gbit", "mbit", "kbit"):
        if bit_s >= _UNITS[unit]:
            return f"{bit_s / _UNITS[unit]:g}{unit}"
    return f"{bit_s}bit"


# Two frames are the least that tbf reaches the rate with, here at 100 Mbit/s (one: 0.895 of it,
# two: 0.999); a third is for its rounding. 64 bytes, because tbf rounds the size down a little.
_BUCKET_BYTES = 3 * FRAME_BYTES + 64
_LEAST_BUCKET_BYTES = 2 * FRAME_BYTES
# At high rates the bucket has to last until the kernel's timer is served, or the rate is not
# reached. So a pause never hides more than this of a message, or three frames.
_TIMER_S = 100e-6
# Above, one core cannot send single packets fast enough (0.33 of 1 Gbit/s on two busy cores, 0.65
# with offload and the same bucket), and below, offload changes nothing (0.998 and 1.000 of
# 100 Mbit/s). tbf cuts what is larger than its bucket into packets in either case.
_OFFLOAD_ABOVE_BIT_S = 200 * 10**6
_OFFLOAD_SEGMENTS = 64  # of a packet that the stack handles in one go: the kernel's 64 KB
# More than TCP has on its way: its windows end at 4 to 6 MB (net.ipv4.tcp_wmem, tcp_rmem).
_QUEUE_BYTES_A_PEER = 8 << 20


@dataclass(frozen=True)
class Shape:
    """What a node's cable lets through, each way.

    Attributes:
        rate_bit_s: frames, their Ethernet headers included; None for no limit.
        burst_bytes: what the token bucket holds: so much passes at once after a pause.
        queue_bytes: what waits before frames are dropped.
        delay_ms: that every frame waits at each end of the cable.
        offload: whether packets travel through the stack several at a time.
    """

    rate_bit_s: int | None
    burst_bytes: int
    queue_bytes: int
    delay_ms: float
    offload: bool

    def tc_lines(self, device: str, old: Shape | None) -> list[str]:
        """What to tell `tc -batch` so that `device` changes from `old` (None: nothing) to this.

        A rate that becomes another one keeps what waits in the queue.
        """
        if old is not None and None not in (old.rate_bit_s, self.rate_bit_s):
            return [f"qdisc change dev {device} root handle 1: {self._bucket()}"]
        lines = []
        if old is not None and old.is_shaped:
            lines.append(f"qdisc del dev {device} root")
        parent = "root"
        if self.rate_bit_s is not None:
            lines.append(f"qdisc add dev {device} root handle 1: {self._bucket()}")
            parent = "parent 1:1"
        if self.delay_ms:
            frames = math.ceil(self.queue_bytes / FRAME_BYTES)
            lines.append(
                f"qdisc add dev {device} {parent} handle 2: netem "
                f"delay {self.delay_ms:g}ms limit {frames}"
            )
        return lines

    def link_line(self, device: str) -> str:
        """What to tell `ip -batch` about `device`."""
        return f"link set dev {device} gso_max_segs {_OFFLOAD_SEGMENTS if self.offload else 1}"

    def _bucket(self) -> str:
        return f"tbf rate {self.rate_bit_s}bit burst {self.burst_bytes}b limit {self.queue_bytes}b"

    @property
    def is_shaped(self) -> bool:
        """Whether tc has anything to do."""
        return self.rate_bit_s is not None or self.delay_ms > 0

    @property
    def payload_mbit_s(self) -> float | None:
        """What a TCP connection can carry at this rate, in 10^6 bits of payload a second."""
        if self.rate_bit_s is None:
            return None
        return self.rate_bit_s / 1e6 * SEGMENT_BYTES / FRAME_BYTES

    @property
    def refill_s(self) -> float:
        """Until an empty bucket is full again, seconds."""
        return 0.0 if self.rate_bit_s is None else self.burst_bytes * 8 / self.rate_bit_s

    def __str__(self) -> str:
        words = [format_rate(self.rate_bit_s)]
        if self.rate_bit_s is not None:
            words.append(f"burst {self.burst_bytes} B")
            words.append(f"queue {self.queue_bytes >> 20} MiB")
        if self.delay_ms:
            words.append(f"delay {self.delay_ms:g} ms an end")
        return ", ".join([*words, f"offload {'on' if self.offload else 'off'}"])


def shape_for(
    rate_bit_s: int | None,
    *,
    peers: int,
    burst_bytes: int | None = None,
    delay_ms: float = 0.0,
) -> Shape:
    """The shape for a rate, with a bucket as small as the rate allows.

    Args:
        peers: other nodes, which may all send to this one at once.
        burst_bytes: another size of the bucket.

    Raises:
        InputError: a burst that the rate cannot be reached with, or a negative delay.
    """
    if not (math.isfinite(delay_ms) and delay_ms >= 0):
        raise InputError(f"a delay is 0 ms or more, not {delay_ms}")
    if burst_bytes is not None and burst_bytes < _LEAST_BUCKET_BYTES:
        raise InputError(
            f"a burst is {_LEAST_BUCKET_BYTES} bytes (two frames) or more, not {burst_bytes}"
        )
    queue_bytes = _QUEUE_BYTES_A_PEER * max(1, peers)
    if rate_bit_s is None:
        return Shape(None, 0, queue_bytes, delay_ms, offload=True)
    if burst_bytes is None:
        burst_bytes = max(_BUCKET_BYTES, math.ceil(rate_bit_s / 8 * _TIMER_S))
    offload = rate_bit_s > _OFFLOAD_ABOVE_BIT_S
    return Shape(rate_bit_s, burst_bytes, queue_bytes, delay_ms, offload)


def largest_harmless_burst_ms(rate_bit_s: float) -> float:
    """How much of a message a bucket of `shape_for`'s size hides at most after a pause."""
    return max(_BUCKET_BYTES * 8 / rate_bit_s, _TIMER_S) * 1e3
