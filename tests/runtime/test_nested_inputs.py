"""Ranks in processes of their own take inputs as the model does: nested, by name, of any size."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import InputError
from disco.runtime import RankProcesses
from disco.runtime.children import WorkerError


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)

    def forward(
        self, images: dict[str, list[Tensor]], *, scale: float = 2.0, bias: Tensor
    ) -> tuple[dict[str, Tensor], None]:
        y = sum(torch.relu(self.a(x)) for x in images["views"])
        return {"map": self.b(y) * scale + bias[:, :, None, None]}, None


@torch.no_grad()
def test_nested_and_named_inputs_of_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    images = {"views": [torch.randn(1, 3, 8, 8) for _ in range(2)]}
    cut = disco.partition(
        model, (images,), 2, example_kwargs={"bias": torch.randn(1, 6)}, dynamic_size=True
    )
    cut.save(tmp_path / "out")
    with RankProcesses(tmp_path / "out") as cluster:
        for batch, height, width in [(1, 8, 8), (3, 11, 6)]:
            images = {"views": [torch.randn(batch, 3, height, width) for _ in range(2)]}
            bias = torch.randn(batch, 6)
            expected = model(images, bias=bias)[0]["map"]
            outputs = cluster.run(images, bias=bias, scale=2.0).outputs
            assert len(outputs) == 2
            for maps, nothing in outputs:
                assert nothing is None
                error = float((maps["map"] - expected).abs().max())
                assert error <= 1e-5 * float(expected.abs().max())
        with pytest.raises(InputError, match="tensors, constants, dicts, lists and tuples"):
            cluster.run(images, bias=object())
        with pytest.raises(InputError, match="'bias' is missing"):
            cluster.run(images)


def test_refused_inputs_leave_the_processes_usable(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(3, 4, 1).eval()
    x = torch.randn(2, 3, 4, 4)
    disco.partition(model, (x,), 2).save(tmp_path / "saved")
    with RankProcesses(tmp_path / "saved", threads=1, timeout_s=60) as ranks:
        for _ in range(2):
            with pytest.raises(InputError, match="'input' must be"):
                ranks.run(torch.randn(2, 5, 4, 4))
            (first, second) = ranks.run(x).outputs
            assert torch.equal(first, second)
            assert torch.allclose(first, model(x), atol=1e-5)


def test_processes_that_ended_with_an_error_say_so_at_once(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(3, 4, 1).eval()
    x = torch.randn(2, 3, 4, 4)
    disco.partition(model, (x,), 2).save(tmp_path / "saved")
    with RankProcesses(tmp_path / "saved", threads=1, timeout_s=60) as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match="rank 0 was ended by signal 9"):
            ranks.run(x)
        began = time.monotonic()
        with pytest.raises(WorkerError, match="started again .* it was: rank 0 was ended"):
            ranks.run(x)
        assert time.monotonic() - began < 30
