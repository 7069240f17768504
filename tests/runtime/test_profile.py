"""Accounts, aligned clocks, traces: what a run says about its time, from real processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter_ns

import pytest
import torch
from torch import Tensor

from disco.errors import InputError, TransportError
from disco.executor import InProcessHub, Span, Timeline, Transfer
from disco.partition.plan import Plan
from disco.runtime import RankProcesses, RunResult
from disco.runtime.accounts import Account, covered_ns, reports
from disco.runtime.clocks import answer_offsets, measure_offsets
from disco.runtime.profile import Profile, Profiled, check_profile, chrome_trace, write_profile

IN_FLIGHT = 2


@pytest.fixture(scope="module")
def processes(other_folder: Path) -> Iterator[RankProcesses]:
    """A plan in which every pair sends something in every exchange."""
    with RankProcesses(other_folder, threads=1) as started:
        yield started


@pytest.fixture(scope="module")
def results(processes: RankProcesses, tiny_input: Tensor) -> list[RunResult]:
    """Profiled requests, two in flight."""
    found = list(processes.run_stream([tiny_input] * 6, IN_FLIGHT, profile=True))
    assert all(isinstance(result, RunResult) for result in found)
    return [result for result in found if isinstance(result, RunResult)]


@pytest.fixture(scope="module")
def profile(processes: RankProcesses, results: list[RunResult]) -> Profile:
    requests = [Profiled(f"{i}.jpg", result.timelines) for i, result in enumerate(results)]
    return Profile(processes.manifest.plan, "tcp", IN_FLIGHT, (0, 1500), requests)


# Accounts -----------------------------------------------------------------------------------------


def _check_reports(result: RunResult, plan: Plan) -> None:
    for rank, report in enumerate(result.ranks):
        assert report.rank == rank
        assert report.bytes_sent == result.bytes_sent[rank] == sum(plan.bytes_matrix[rank])
        assert report.bytes_received == result.bytes_received[rank]
        assert report.bytes_received == sum(row[rank] for row in plan.bytes_matrix)
        parts = report.compute_ms + report.pack_ms + report.wait_ms
        assert 0 < report.compute_ms < parts <= report.latency_ms <= result.latency_ms
        assert report.wire_ms > 0


def test_every_request_reports_where_its_time_went(
    processes: RankProcesses, results: list[RunResult], tiny_input: Tensor
) -> None:
    alone = processes.run(tiny_input)
    assert alone.timelines == ()
    for result in (alone, *results):
        _check_reports(result, processes.manifest.plan)


def test_spans_lie_in_the_request_and_apart(results: list[RunResult]) -> None:
    for result in results:
        for timeline, report in zip(result.timelines, result.ranks, strict=True):
            for before, after in itertools.pairwise(timeline.spans):
                assert before.begin_ns <= before.end_ns <= after.begin_ns
            assert result.begin_ns <= timeline.spans[0].begin_ns
            assert timeline.spans[-1].end_ns <= result.end_ns
            assert timeline.total_ms <= report.latency_ms
            for kind in ("compute", "pack", "wait"):
                total = getattr(timeline, f"{kind}_ms")
                assert abs(total - getattr(report, f"{kind}_ms")) < 1e-6


def test_a_rank_computes_one_request_at_a_time(results: list[RunResult]) -> None:
    for rank in range(2):
        spans = [s for r in results for s in r.timelines[rank].spans if s.kind != "wait"]
        spans.sort(key=lambda span: span.begin_ns)
        for before, after in itertools.pairwise(spans):
            assert before.end_ns <= after.begin_ns


def test_nothing_arrives_before_it_is_sent(
    profile: Profile, results: list[RunResult], processes: RankProcesses
) -> None:
    """On one machine the clock is one, so without any tolerance."""
    for request in profile.requests:
        payloads = list(request.payloads())
        assert len(payloads) == 2 * len(processes.manifest.plan.exchanges)
        for _, send, arrival in payloads:
            assert send.begin_ns < arrival.end_ns and send.bytes == arrival.bytes
    assert all(result.clock_error_ns == (0, 0) for result in results)


def _account(*transfers: Transfer) -> Account:
    return Account(0, 10, 1.0, 2.0, 3.0, transfers)


def test_wire_time_is_what_at_least_one_payload_takes() -> None:
    assert covered_ns([(0, 4), (2, 6), (10, 12), (11, 11), (9, 3)]) == 8
    assert covered_ns([]) == 0
    first = _account(Transfer(True, 0, 1, 40, 100, 110), Transfer(True, 1, 1, 8, 150, 160))
    second = _account(Transfer(False, 0, 0, 40, 5, 180), Transfer(False, 1, 0, 8, 5, 250))
    sender, receiver = reports([first, second])
    assert (sender.wire_ms, sender.bytes_sent, sender.bytes_received) == (0.0, 48, 0)
    assert (receiver.wire_ms, receiver.bytes_received) == (150e-6, 48)
    assert receiver.latency_ms == 10e-6
    with pytest.raises(TransportError, match="exchange 0 of rank 0, which does not say"):
        reports([_account(), second])


def test_accounts_survive_json_and_say_what_is_none() -> None:
    account = Account(
        5, 9, 1.0, 2.0, 3.0, (Transfer(True, 0, 1, 40, 100, 110),), (Span("a", "wait", 6, 7),)
    )
    assert Account.from_plain(json.loads(json.dumps(account.to_plain()))) == account
    assert account.shifted(-5).spans[0].begin_ns == 1 and account.shifted(-5).end_ns == 4
    for damaged in ({}, {"numbers": [1], "transfers": [], "spans": []}):
        with pytest.raises(TransportError, match="account cannot be read"):
            Account.from_plain(damaged)


# Clocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_ns", [0, 3_600_000_000_000, -86_400_000_000_123])
@pytest.mark.parametrize("leader", [0, 2])
def test_skewed_clocks_are_found(ahead_ns: int, leader: int) -> None:
    """Within the uncertainty that is stated, which is a strict bound."""
    transports = InProcessHub(3).transports()

    def take_part(rank: int):  # type: ignore[no-untyped-def]
        if rank == leader:
            return measure_offsets(transports[rank], 30)
        answer_offsets(transports[rank], leader, 30, lambda: perf_counter_ns() + ahead_ns * rank)
        return None

    with ThreadPoolExecutor(3) as pool:
        offsets = list(pool.map(take_part, range(3)))[leader]
    for rank, offset in enumerate(offsets):
        if rank == leader:
            assert (offset.ahead_ns, offset.error_ns) == (0, 0)
        else:
            assert 0 < offset.error_ns < 1_000_000_000
            assert abs(offset.ahead_ns - ahead_ns * rank) <= offset.error_ns


# Traces -------------------------------------------------------------------------------------------


def test_a_trace_has_every_exchange_and_what_waits_are_for(
    profile: Profile, processes: RankProcesses, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    write_profile(profile, path)
    trace = json.loads(path.read_text())
    plan = processes.manifest.plan
    data = trace["otherData"]
    assert data["plan"] == plan.digest and data["in_flight"] == IN_FLIGHT
    assert data["clock_uncertainty_us"] == {"rank 0": 0.0, "rank 1": 1.5}
    events = trace["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}
    wire = [e for e in events if e["ph"] == "b"]
    numbers = range(len(profile.requests))
    wanted = {
        f"{n}.{e.number}.{1 - receiver}.{receiver}"
        for n in numbers
        for e in plan.exchanges
        for receiver in range(2)
    }
    assert {e["id"] for e in wire} == wanted and len(wire) == len(wanted)
    assert sum(e["args"]["bytes"] for e in wire) == len(numbers) * plan.bytes_per_image
    assert {e["id"] for e in events if e["ph"] == "e"} == wanted
    for exchange in plan.exchanges:
        for rank in range(2):
            packs = [
                e
                for e in events
                if e.get("cat") == "pack"
                and (e["pid"], e["args"].get("exchange")) == (rank, exchange.number)
            ]
            assert len(packs) == len(numbers)
            assert all(exchange.value in e["name"] for e in packs)
    waits = [e for e in events if e.get("cat") == "wait"]
    assert waits
    for wait in waits:
        assert f"exchange {wait['args']['exchange']} (" in wait["name"]
        assert wait["args"]["peer"] == 1 - wait["pid"] and wait["dur"] >= 0
    _check_arrows(events)
    _check_tracks(events)


def _check_arrows(events: list[dict]) -> None:  # type: ignore[type-arg]
    """Each begins in the packing of its exchange and ends in a wait for it."""
    slices = [e for e in events if e["ph"] == "X"]
    arrows = [e for e in events if e["ph"] in "sf"]
    assert len(arrows) == 2 * len({e["id"] for e in arrows}) > 0
    for arrow in arrows:
        number, exchange = (int(part) for part in arrow["id"].split(".")[:2])
        kind = "pack" if arrow["ph"] == "s" else "wait"
        assert any(
            s["cat"] == kind
            and (s["pid"], s["tid"]) == (arrow["pid"], arrow["tid"])
            and (s["args"]["request"], s["args"].get("exchange")) == (number, exchange)
            and s["ts"] - 1e-3 <= arrow["ts"] <= s["ts"] + s["dur"] + 1e-3
            for s in slices
        ), arrow


def _check_tracks(events: list[dict]) -> None:  # type: ignore[type-arg]
    """Slices of one track do not overlap, so that a viewer does not nest them."""
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            stretch = (event["ts"], event["ts"] + event["dur"])
            tracks.setdefault((event["pid"], event["tid"]), []).append(stretch)
    assert len(tracks) >= 6
    for stretches in tracks.values():
        stretches.sort()
        for (_, end), (begin, _) in itertools.pairwise(stretches):
            assert end <= begin + 1e-3


def test_clock_errors_do_not_make_negative_lengths(processes: RankProcesses) -> None:
    sent = Timeline([Span("a", "pack", 100, 200)], [Transfer(True, 0, 1, 4, 150, 180)])
    got = Timeline([Span("b", "wait", 90, 140, 4, 0, 0)], [Transfer(False, 0, 0, 4, 80, 140)])
    one = Profile(processes.manifest.plan, "tcp", 1, (0, 50), [Profiled("x", (sent, got))])
    events = chrome_trace(one)["traceEvents"]
    begin, end = (next(e["ts"] for e in events if e["ph"] == ph) for ph in "be")
    assert begin == end
    begin, end = (next(e["ts"] for e in events if e["ph"] == ph) for ph in "sf")
    assert begin == end


def test_a_picture(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.png"
    write_profile(profile, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    write_profile(Profile(profile.plan, "tcp", 1), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_other_endings_are_refused(profile: Profile, tmp_path: Path) -> None:
    for name in ("trace.svg", "trace", "trace.json.gz"):
        with pytest.raises(InputError, match=r"a profile ends in \.json or \.png"):
            write_profile(profile, tmp_path / name)
    with pytest.raises(InputError, match="give a file in a folder that exists"):
        check_profile(tmp_path / "none" / "trace.json")
    assert not list(tmp_path.iterdir())


def test_profiling_does_not_show_in_the_outputs(
    processes: RankProcesses, results: list[RunResult], tiny_input: Tensor
) -> None:
    alone = processes.run(tiny_input)
    for result in results:
        for output, expected in zip(result.outputs, alone.outputs, strict=True):
            assert torch.equal(output, expected)
