"""Every form of exchange between real processes: inputs, partial sums, channels with statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.bench.compare import compare, whole_model
from disco.runtime import RankProcesses


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.group = nn.GroupNorm(3, 24)
        self.body = nn.Conv2d(16, 24, 3)
        self.narrow = nn.Conv2d(24, 4, 1)
        self.norm = nn.LayerNorm(24)
        self.mix = nn.Linear(24, 20)
        self.head = nn.Linear(20, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.body(self.stem(x).relu()))
        tokens = self.mix(self.norm(x.flatten(2).transpose(1, 2))).relu()
        maps = self.up(self.narrow(x)).flatten(1)
        return torch.cat((self.head(tokens).flatten(1), maps), 1)


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16, torch.int8])
def test_two_processes_in_a_wire_dtype(tmp_path: Path, wire: torch.dtype) -> None:
    """Narrow values with float32 statistics behind them; as in one process, bit for bit."""
    torch.manual_seed(0)
    model = _Model().eval()
    x = torch.randn(3, 3, 17, 17)
    pattern = disco.sparsify_(model, 2, 0.25, (x,), group_size=2)
    partitioned = disco.partition(model, (x,), 2, pattern=pattern, wire_dtype=wire)
    plan = partitioned.plan
    assert any(exchange.statistics and exchange.is_narrow for exchange in plan.exchanges)
    partitioned.save(tmp_path / "out")
    with torch.no_grad():
        expected = partitioned(x)
    with RankProcesses(tmp_path / "out") as cluster:
        run = cluster.run(x)
    assert all(torch.equal(output, expected) for output in run.outputs)
    assert run.bytes_sent == tuple(sum(row) for row in plan.bytes_matrix_for(3))


def test_two_processes_run_what_was_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Model().eval()
    x = torch.randn(2, 3, 17, 17)
    pattern = disco.sparsify_(model, 2, 0.25, (x,), group_size=2)
    partitioned = disco.partition(model, (x,), 2, pattern=pattern)
    plan = partitioned.plan
    assert {exchange.form for exchange in plan.exchanges} == {"inputs", "partial sums"}
    assert any(exchange.statistics for exchange in plan.exchanges)
    partitioned.save(tmp_path / "out")
    exact = whole_model(model, x)
    with RankProcesses(tmp_path / "out") as cluster:
        run = cluster.run(x)
    for output in run.outputs:
        assert compare(output, exact).equal
    assert run.bytes_sent == tuple(2 * sum(row) for row in plan.bytes_matrix)
