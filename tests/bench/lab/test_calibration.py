"""The fit on round trips that are made up, and `runtime/ping.py` over loopback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from disco.bench.lab.calibration import Calibration, fit_link
from disco.runtime import ping
from disco.runtime.ping import RoundTrips

SIZES = [64 * 4**power for power in range(9)]
LIMIT_MBIT_S = 100.0
BYTES_PER_S = LIMIT_MBIT_S * 1e6 / 8


def wire(
    *, latency_s: float = 1e-4, bucket_bytes: int = 0, jitter: float = 0.0
) -> list[RoundTrips]:
    """Exact times of a bucket that is full before each message."""
    return [
        RoundTrips(
            size,
            tuple(
                2 * latency_s * (1 + jitter * index) + max(0, size - bucket_bytes) / BYTES_PER_S
                for index in range(5)
            ),
            0.0,
        )
        for size in SIZES
    ]


def test_line_without_a_bucket() -> None:
    link = fit_link(0, 1, wire(), LIMIT_MBIT_S)
    assert link.bandwidth_mbit_s == pytest.approx(LIMIT_MBIT_S)
    assert link.latency_ms == pytest.approx(0.1, rel=0.05)  # the smallest message has 64 bytes
    assert link.worst_residual < 1e-9
    assert link.free_bytes == 0
    assert link.warning == ""


def test_bucket_of_three_frames_is_no_warning_and_shifts_nothing() -> None:
    link = fit_link(0, 1, wire(bucket_bytes=4606), LIMIT_MBIT_S)
    assert link.bandwidth_mbit_s == pytest.approx(LIMIT_MBIT_S)
    assert link.free_bytes == pytest.approx(4606, abs=65)
    assert link.warning == ""


def test_bucket_too_large_is_told() -> None:
    link = fit_link(0, 1, wire(bucket_bytes=32768), LIMIT_MBIT_S)
    assert link.bandwidth_mbit_s == pytest.approx(LIMIT_MBIT_S)
    assert link.free_bytes == pytest.approx(32768, abs=65)
    assert link.small_mbit_s is None  # 16 KB take no longer than 64 bytes
    assert "pass for nothing, which hides 2.6" in link.warning
    assert Calibration((), "", 1.0, (link,)).warnings == [link.warning]


def test_bucket_without_a_known_rate_is_left_open() -> None:
    link = fit_link(0, 1, wire(bucket_bytes=32768), None)
    assert link.free_bytes is None
    assert link.warning == ""
    assert link.worst_residual > 0.8  # but the line does not describe it


def test_slower_than_the_rate_allows_is_told() -> None:
    link = fit_link(0, 1, wire(), 2 * LIMIT_MBIT_S)
    assert "100.0 of the 200.0 Mbit/s that the rate allows" in link.warning


def test_disturbed_sizes_hardly_count() -> None:
    trips = wire(jitter=0.5)
    slow = trips[6]
    trips[6] = RoundTrips(slow.bytes, tuple(3 * second for second in slow.seconds), 0.0)
    link = fit_link(0, 1, trips, LIMIT_MBIT_S)
    assert link.bandwidth_mbit_s == pytest.approx(LIMIT_MBIT_S, rel=0.02)
    assert link.residual < 0.1 < link.worst_residual


def test_times_without_a_slope() -> None:
    flat = [RoundTrips(size, (1e-3,), 0.0) for size in SIZES]
    with pytest.raises(ValueError, match="took no longer than smaller ones"):
        fit_link(0, 1, flat, None)


def test_result_is_json_with_its_points() -> None:
    trips = [*wire(), RoundTrips(1 << 30, (), 85.9)]
    result = Calibration(("100mbit",), "core 0", 10.0, (fit_link(0, 1, trips, None),))
    data = json.loads(json.dumps(result.to_json()))
    assert [point["bytes"] for point in data["links"][0]["points"]] == SIZES
    assert data["links"][0]["skipped"] == [{"bytes": 1 << 30, "expected_s": 85.9}]
    assert f"left out: {1 << 30} bytes, some 86 s each" in str(result)
    assert result.link(0, 1) is result.links[0]
    with pytest.raises(KeyError, match="no link from 1 to 0"):
        result.link(1, 0)


def test_ping_over_loopback_leaves_out_what_takes_too_long() -> None:
    sizes = [8, 4096, 1 << 20, 1 << 22]
    for longest_s, timed in ((60.0, [3, 2, 1, 1]), (0.0, [0, 0, 0, 0])):
        with subprocess.Popen(
            [sys.executable, "-I", "-S", ping.__file__, "listen", "127.0.0.1"],
            stdout=subprocess.PIPE,
            text=True,
        ) as listener:
            assert listener.stdout is not None
            port = int(listener.stdout.readline())
            results = ping.measure(
                "127.0.0.1", port, sizes, [3, 2, 1, 1], gap_s=1e-3, longest_s=longest_s
            )
            assert listener.wait(10) == 0
        assert [len(result.seconds) for result in results] == timed
        assert all(result.expected_s > 0 for result in results)


def test_ping_to_nobody_is_one_line() -> None:
    command = [sys.executable, "-I", "-S", ping.__file__, "connect", "127.0.0.1", "1"]
    command += ["--sizes", "8", "--repeats", "1", "--gap-s", "0", "--longest-s", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "ping: [Errno 111] Connection refused\n"
