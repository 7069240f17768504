"""Rates and buckets as numbers; nothing is run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disco.bench.lab.cores import choose_cores, parse_cores
from disco.bench.lab.network import explain
from disco.bench.lab.rates import FRAME_BYTES, format_rate, parse_delay, parse_rate, shape_for
from disco.errors import InputError


@pytest.mark.parametrize(
    ("text", "bit_s"),
    [("100mbit", 10**8), ("2.5Gbit", 25 * 10**8), ("250kbit", 250_000), ("none", None)],
)
def test_rate(text: str, bit_s: int | None) -> None:
    assert parse_rate(text) == bit_s
    assert parse_rate(format_rate(bit_s)) == bit_s


@pytest.mark.parametrize("text", ["", "100", "100mbps", "-1mbit", "1e3mbit", "nan", "1 mbit"])
def test_no_rate(text: str) -> None:
    with pytest.raises(InputError, match=r"a rate is a number and bit.*for example 100mbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["99kbit", "0mbit", "101gbit"])
def test_rate_out_of_range(text: str) -> None:
    with pytest.raises(InputError, match=r"from 100kbit to 100gbit, not"):
        parse_rate(text)


def test_delay() -> None:
    assert [parse_delay(text) for text in ("1ms", "500us", "0.2s")] == [1.0, 0.5, 200.0]
    with pytest.raises(InputError, match=r"for example 1ms, not '1'"):
        parse_delay("1")


def test_bucket_hides_three_frames_or_a_tenth_of_a_millisecond() -> None:
    for bit_s in (10**5, 10**7, 10**8, 10**9, 10**10):
        shape = shape_for(bit_s, peers=1)
        assert shape.burst_bytes >= 3 * FRAME_BYTES
        assert shape.burst_bytes <= max(3 * FRAME_BYTES + 64, bit_s * 100e-6 / 8)


def test_queue_holds_the_windows_of_all_peers() -> None:
    assert shape_for(10**8, peers=7).queue_bytes == 7 * shape_for(10**8, peers=1).queue_bytes


def test_burst_too_small_for_the_rate() -> None:
    with pytest.raises(InputError, match=r"3028 bytes \(two frames\) or more, not 1514"):
        shape_for(10**8, peers=1, burst_bytes=1514)


def test_changes_of_a_shape() -> None:
    slow, fast = shape_for(10**7, peers=1), shape_for(10**8, peers=1)
    free = shape_for(None, peers=1)
    bucket = f"handle 1: tbf rate 10000000bit burst {slow.burst_bytes}b limit {slow.queue_bytes}b"
    assert slow.tc_lines("x", None) == [f"qdisc add dev x root {bucket}"]
    assert slow.tc_lines("x", fast) == [f"qdisc change dev x root {bucket}"]
    assert slow.tc_lines("x", free) == [f"qdisc add dev x root {bucket}"]
    assert free.tc_lines("x", slow) == ["qdisc del dev x root"]
    assert free.tc_lines("x", None) == []


def test_delay_lies_below_the_bucket() -> None:
    delayed = replace(shape_for(10**7, peers=1), delay_ms=0.5)
    assert delayed.tc_lines("x", None)[1] == (
        "qdisc add dev x parent 1:1 handle 2: netem delay 0.5ms limit 5541"
    )
    only = shape_for(None, peers=1, delay_ms=0.5)
    assert [line.split(" limit")[0] for line in only.tc_lines("x", None)] == [
        "qdisc add dev x root handle 2: netem delay 0.5ms"
    ]


def test_cores() -> None:
    assert parse_cores("0,1") == [[0], [1]]
    assert parse_cores("0-3,4-7") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for text in ("", "a", "0-", "-1", "0,,1"):
        with pytest.raises(InputError, match="for example 0,1 or 0-3,4-7"):
            parse_cores(text)
    with pytest.raises(InputError, match="range of cores 3-1 is empty"):
        parse_cores("3-1")


def test_choice_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 5})
    assert choose_cores(2, None) == ([[2], [5]], "node 0: core 2; node 1: core 5")
    cores, note = choose_cores(3, None)
    assert cores == [[], [], []]
    assert note.startswith("3 nodes share 2 cores, not pinned")
    assert "core 2 is shared" in choose_cores(2, [[2], [2, 5]])[1]
    with pytest.raises(InputError, match=r"core 0 is not one that this process may use: \[2, 5\]"):
        choose_cores(2, [[0], [2]])
    with pytest.raises(InputError, match="cores for 1 nodes, but there are 2"):
        choose_cores(2, [[2]])
    with pytest.raises(InputError, match="a node without cores"):
        choose_cores(2, [[2], []])


def test_refusals_of_the_kernel_are_explained() -> None:
    unknown = "Error: Specified qdisc kind is unknown."
    assert "no netem queueing discipline, which a delay needs" in explain(
        "tc", "qdisc add dev x root netem delay 1ms", unknown
    )
    assert "no tbf queueing discipline, which a rate needs" in explain(
        "tc", "qdisc add dev x root tbf rate 1mbit", unknown
    )
    assert "no interfaces of type veth" in explain(
        "ip", "link add name x type veth peer name y", "Error: Unknown device type."
    )
    assert explain("ip", "link", "RTNETLINK answers: busy") == "ip failed: RTNETLINK answers: busy"
