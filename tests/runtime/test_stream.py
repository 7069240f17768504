"""Several requests in flight over real processes, timelines, and what memory they took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from disco.errors import InputError
from disco.runtime import RankProcesses


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_streams_and_timelines(tiny_folder: Path, tiny_input: Tensor, transport: str) -> None:
    with RankProcesses(tiny_folder, threads=1, transport=transport) as ranks:
        before = ranks.run(tiny_input)
        for in_flight in (1, 2, 3):
            seconds = ranks.measure_stream(tiny_input, in_flight=in_flight, warmup=2, repeats=5)
            assert len(seconds) == 2 and min(seconds) > 0
        sent = [0, 0]
        for rank, timeline in enumerate(ranks.profile(tiny_input, warmup=1)):
            kinds = {span.kind for span in timeline.spans}
            assert {"compute", "pack"} <= kinds <= {"compute", "pack", "progress", "wait"}
            sent[rank] = sum(span.bytes for span in timeline.spans if span.kind == "pack")
            assert 0 < timeline.compute_ms < timeline.total_ms
        assert tuple(sent) == before.bytes_sent
        after = ranks.run(tiny_input)
        assert all(torch.equal(a, b) for a, b in zip(before.outputs, after.outputs, strict=True))
        assert all(0 < grown < 500e6 for grown in ranks.memory_growth())


def test_overlap_does_not_show_in_the_bits(tiny_folder: Path, tiny_input: Tensor) -> None:
    outputs = []
    for overlap in (True, False):
        with RankProcesses(tiny_folder, threads=1, overlap=overlap) as ranks:
            for _ in range(3):  # the first request of a shape is computed in one pass
                outputs.append(ranks.run(tiny_input).outputs[0])
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_none_in_flight_is_refused(tiny_folder: Path, tiny_input: Tensor) -> None:
    with (
        pytest.raises(InputError, match="in_flight must be at least 1, given 0"),
        RankProcesses(tiny_folder, threads=1) as ranks,
    ):
        ranks.measure_stream(tiny_input, in_flight=0, warmup=1, repeats=1)
