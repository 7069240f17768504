"""What a profiled request says about its time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import disco
from disco.executor import Executor, InProcessHub, Span, Timeline
from disco.partition import Plan


def test_sums_by_kind() -> None:
    spans = [
        Span("a", "compute", 1_000_000, 3_000_000),
        Span("a.exchange", "pack", 3_000_000, 3_500_000, 40),
        Span("b", "wait", 4_000_000, 8_000_000, 50),
        Span("b", "compute", 8_000_000, 9_000_000),
    ]
    timeline = Timeline(spans)
    assert (timeline.compute_ms, timeline.pack_ms, timeline.wait_ms) == (3.0, 0.5, 4.0)
    assert timeline.total_ms == 8.0
    assert Timeline().total_ms == Timeline().wait_ms == 0.0


@torch.no_grad()
def test_a_profiled_call() -> None:
    """Spans in order and apart, every step once, and all bytes of the plan."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 30, 3, padding=1),
        nn.Conv2d(30, 8, 1),
    ).eval()
    partitioned = disco.partition(model, (torch.randn(1, 3, 8, 8),), 2)
    transports = InProcessHub(2).transports()
    executors = [
        Executor(rank.program, rank.weights, transport, deadline_s=20)
        for rank, transport in zip(partitioned.ranks, transports, strict=True)
    ]
    x = torch.randn(2, 3, 8, 8)

    def runs(executor: Executor) -> list[Tensor]:
        results = []
        for profile in (False, False, True, False):
            executor.profile = profile
            results.append(executor(x))
        return results

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(runs, executors))
    assert all(torch.equal(found[0][0], result) for results in found for result in results)
    for rank, executor in enumerate(executors):
        timeline = executor.last_timeline
        assert timeline is not None
        for before, after in zip(timeline.spans, timeline.spans[1:], strict=False):
            assert before.begin_ns <= before.end_ns <= after.begin_ns
        steps = [span.name for span in timeline.spans if span.kind in ("compute", "pack")]
        assert steps == [step.name for step in executor._steps]
        sent = sum(span.bytes for span in timeline.spans if span.kind == "pack")
        assert sent == 2 * sum(partitioned.plan.bytes_matrix[rank]) > 0
        parts = timeline.compute_ms + timeline.pack_ms + timeline.wait_ms
        assert 0 < parts <= timeline.total_ms
        _check_messages(partitioned.plan, rank, timeline)
        assert Timeline.from_plain(json.loads(json.dumps(timeline.to_plain()))) == timeline
        later = timeline.shifted(1_000_000)
        assert later.spans[0].begin_ns == timeline.spans[0].begin_ns + 1_000_000
        assert (later.wait_ms, later.total_ms) == (timeline.wait_ms, timeline.total_ms)


def _check_messages(plan: Plan, rank: int, timeline: Timeline) -> None:
    """Those of the plan for two images, with exchange and peer, and every wait is for one."""
    found = {(t.exchange, t.sent, t.peer): t for t in timeline.transfers}
    assert len(found) == len(timeline.transfers)
    for exchange in plan.exchanges:
        for sent, pair in ((True, (1 - rank, rank)), (False, (rank, 1 - rank))):
            transfer = found.pop((exchange.number, sent, 1 - rank))
            assert transfer.bytes == exchange.bytes_between(*pair, batch=2) > 0
            assert transfer.begin_ns < transfer.end_ns
    assert not found
    for span in timeline.spans:
        if span.kind == "wait":
            assert span.peer == 1 - rank and span.exchange is not None and span.bytes > 0


def test_nothing_is_written_unless_asked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1)).eval()
    partitioned = disco.partition(model, (torch.randn(1, 3, 8, 8),), 1)
    executor = Executor(partitioned.ranks[0].program, partitioned.ranks[0].weights)
    executor(torch.randn(1, 3, 8, 8))
    assert executor.last_timeline is None
