"""Means over whole maps run on the kernel, and views of kept memory are made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disco
from disco.executor import Executor, run_together
from disco_kernels.backends.cpu import extension_status

pytestmark = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)


class Head(nn.Module):
    """A convolution, something between, a linear."""

    def __init__(self, between: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 40, 3, padding=1)
        self.between = between
        self.linear = nn.Linear(features, 10)
        self.last = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.between(F.relu(self.conv(x))))
        return self.last(F.relu(y))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 1)
        self.down, self.up = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scale = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.last(y * scale)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pool": (lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), 40),
    "pool (1, 1)": (lambda y: F.adaptive_avg_pool2d(y, (1, 1)).view(y.shape[0], -1), 40),
    "mean": (lambda y: y.mean((-1, -2), keepdim=True).squeeze(-1).squeeze(-1), 40),
    "mean, dims gone": (lambda y: y.mean((2, 3)), 40),
    "mean of rows": (lambda y: y.mean(2, keepdim=True).flatten(1), 40 * 6),
    "pool to 2 x 2": (lambda y: F.adaptive_avg_pool2d(y, 2).flatten(1), 160),
    "flatten": (lambda y: y.flatten(1), 40 * 6 * 6),  # of channels-last memory: a copy
    "tokens": (lambda y: y.flatten(2).transpose(1, 2), 40),
    "permuted": (lambda y: y.permute(0, 2, 3, 1), 40),
    "unsqueezed": (lambda y: y.permute(0, 2, 3, 1).unsqueeze(1).reshape(-1, 40), 40),
}


def check(model: nn.Module, limit: float = 1e-5) -> None:
    model.eval()
    example = torch.randn(2, 3, 6, 6)
    compiled = disco.compile(model, nodes=2, example_inputs=(example,))
    before: list[tuple[Tensor, Tensor]] = []
    for batch in (2, 2, 2, 1, 1, 3, 2, 1, 2):
        x = torch.randn(batch, 3, 6, 6)
        with torch.no_grad():
            wanted, found = model(x), compiled(x)
        before.append((found, wanted))
        for y, expected in before:  # earlier results stay what they were
            assert y.shape == expected.shape
            assert float((y - expected).abs().max()) <= limit * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_a_map_and_a_linear(name: str) -> None:
    torch.manual_seed(0)
    check(Head(*BETWEEN[name]))


@torch.no_grad()
def test_ranks_pool_with_the_kernels() -> None:
    """And torch pools what the kernels do not: a rank's program does not tell them apart."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 40, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(40, 24, 1))
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7)).eval()
    for dtype in (torch.float32, torch.float64):
        model, x = model.to(dtype), torch.randn(2, 3, 20, 21, dtype=dtype)
        backend = None if dtype == torch.float32 else "reference"
        partitioned = disco.partition(model, (x,), 2)
        executors = [Executor(r.program, r.weights, backend=backend) for r in partitioned.ranks]
        for _ in range(4):
            x = torch.randn(2, 3, 20, 21, dtype=dtype)
            for result in run_together(executors, (x,)):
                limit = 300 * torch.finfo(dtype).eps * float(model(x).abs().max())
                assert float((result - model(x)).abs().max()) <= limit
        for executor in executors:
            (known,) = executor._buffers._known.values()
            (kept,) = known.free
            slots = {step.name: step.out for step in executor._steps}
            assert slots["max_pool2d"] in kept.activations.out
            bound = slots["adaptive_avg_pool2d"] in kept.activations.bound
            assert bound == (dtype == torch.float32)


def test_squeeze_excite() -> None:
    torch.manual_seed(0)
    check(SqueezeExcite())


def test_the_model_may_return_a_view_of_the_mean() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.adaptive_avg_pool2d(self.conv(x), 1)
            return y.flatten(1), y

    torch.manual_seed(0)
    model = Pool().eval()
    compiled = disco.compile(model, nodes=1, example_inputs=(torch.randn(2, 3, 5, 5),))
    kept = []
    for _ in range(4):
        x = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            kept.append((compiled(x), model(x)))
        for found, wanted in kept:
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
