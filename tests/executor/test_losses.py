"""Requests without some ranks: their channels count as zero, and as not there for statistics."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.executor import Executor, InProcessHub, run_together
from disco_kernels import Ownership

# Sums of some hundred terms in float32, a few layers deep.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


class Residual(nn.Module):
    """Convolutions, a residual and a classifier; `mask` stands for a model without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 18, 3, padding=1)
        self.b, self.fc = nn.Conv2d(18, 12, 1), nn.Linear(12, 7)

    def forward(self, x: Tensor, there: Sequence[Tensor] = ()) -> Tensor:
        narrow, wide = there or (1, 1)
        x = torch.relu(self.stem(x)) * _channels(narrow)
        y = torch.relu(self.a(x)) * _channels(wide)
        x = torch.relu(self.b(y) + x) * _channels(narrow)
        return self.fc(x.mean((2, 3)))


class Normed(nn.Module):
    """Tokens through a layer norm (received channels are normalised where they arrive), a mean over
    channels and a linear; statistics are of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.up, self.down, self.fc = nn.Linear(12, 18), nn.Linear(18, 12), nn.Linear(12, 7)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, there: Sequence[Tensor] = ()) -> Tensor:
        x = self.embed(x)
        if not there:
            x = x - x.mean(-1, keepdim=True)
            x = x + self.down(torch.sigmoid(self.up(self.norm(x))))
            return self.fc(x).softmax(-1)
        narrow, wide = there
        x = x - x[..., narrow > 0].mean(-1, keepdim=True)
        kept = x[..., narrow > 0]
        mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, unbiased=False, keepdim=True)
        y = (x - mean) / (variance + self.norm.eps).sqrt() * self.norm.weight + self.norm.bias
        y = torch.sigmoid(self.up(y * narrow)) * wide
        return self.fc((x + self.down(y)) * narrow).softmax(-1)


class Grouped(nn.Module):
    """A group norm whose groups are cut by the shares, and a head that keeps its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(2, 12)
        self.a, self.b = nn.Conv2d(12, 18, 1), nn.Conv2d(18, 4 * 3, 3, padding=1)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, there: Sequence[Tensor] = ()) -> Tensor:
        x = self.stem(x)
        if not there:
            y = torch.sigmoid(self.a(self.norm(x)))
            return nn.functional.pixel_shuffle(self.b(y), 2)
        narrow, wide = there
        groups = []
        for part, kept in zip(x.chunk(2, 1), narrow.chunk(2), strict=True):
            found = part[:, kept > 0]
            mean, variance = found.mean((1, 2, 3)), found.var((1, 2, 3), unbiased=False)
            shape = (-1, 1, 1, 1)
            groups.append((part - mean.view(shape)) / (variance + 1e-5).sqrt().view(shape))
        y = torch.cat(groups, 1) * _channels(self.norm.weight) + _channels(self.norm.bias)
        y = torch.sigmoid(self.a(y * _channels(narrow))) * _channels(wide)
        return nn.functional.pixel_shuffle(self.b(y), 2)


def _channels(values: Tensor | int) -> Tensor | int:
    return values.view(-1, 1, 1) if isinstance(values, Tensor) else values


MODELS = {
    "residual": (Residual, (2, 3, 6, 5), ("stem", "b"), ("a",)),
    "normed": (Normed, (2, 9, 5), ("embed", "down"), ("up",)),
    "grouped": (Grouped, (2, 3, 6, 5), ("stem",), ("a",)),
}
# Channels of three ranks, dealt out so that none is contiguous: 12 and 18 of them.
NARROW = Ownership(tuple(tuple(c for c in range(12) if c % 3 == r) for r in range(3)))
WIDE = Ownership(tuple(tuple(c for c in range(18) if (c * 5 + 1) % 3 == r) for r in range(3)))


def _without(owned: Ownership, lost: Sequence[int]) -> Tensor:
    mask = torch.ones(owned.num_channels, dtype=torch.float64)
    for rank in lost:
        mask[list(owned.channels[rank])] = 0
    return mask


@pytest.mark.parametrize("lost", [(0,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_as_the_model_without_their_channels(
    name: str, overlap: bool, lost: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    make, shape, narrow, wide = MODELS[name]
    model = make().eval()
    ownership = {**dict.fromkeys(narrow, NARROW), **dict.fromkeys(wide, WIDE)}
    example = torch.randn(shape)
    partitioned = disco.partition(model, (example,), 3, ownership=ownership, survivable=True)
    assert partitioned.plan.survivable and not partitioned.plan.replicated
    executors = [Executor(r.program, r.weights, overlap=overlap) for r in partitioned.ranks]
    exact_model = copy.deepcopy(model).double()
    there = (_without(NARROW, lost), _without(WIDE, lost))
    # With all, without some (until the memory is bound and used again), and with all once more.
    for gone in ((), lost, lost, lost, ()):
        x = torch.randn(shape)
        transports = InProcessHub(3).transports()
        for transport in transports:
            transport.lost = frozenset(gone)
        left = [rank for rank in range(3) if rank not in gone]
        outputs = run_together([executors[r] for r in left], (x,), [transports[r] for r in left])
        exact = exact_model(x.double(), there) if gone else exact_model(x.double())
        for output in outputs:
            assert torch.equal(output, outputs[0]), "ranks differ"
            error = float((output - exact).abs().max())
            assert error <= TOLERANCE * float(exact.abs().max()), (gone, error)


@torch.inference_mode()
def test_narrow_payloads_and_two_lost_of_three() -> None:
    """Scales of int8 payloads count as nothing, too."""
    model, x = Residual().eval(), torch.randn(1, 3, 6, 5)
    part = disco.partition(model, (x,), 3, survivable=True, wire_dtype=torch.int8)
    transports = InProcessHub(3).transports()
    transports[1].lost = frozenset({0, 2})
    executor = Executor(part.ranks[1].program, part.ranks[1].weights)
    (alone,) = run_together([executor], (x,), [transports[1]])
    assert alone.isfinite().all() and transports[1].bytes_sent == 0


def test_heads_are_exact_and_one_message_of_outputs() -> None:
    model, x = Residual().eval(), torch.randn(2, 3, 6, 5)
    partitioned = disco.partition(model, (x,), 3, survivable=True)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        for output in partitioned.run_ranks(x):
            error = float((output - exact).abs().max())
            assert error <= TOLERANCE * float(exact.abs().max())
    head = partitioned.plan.exchanges[-1]
    assert head.bytes_per_image == 3 * 2 * 7 * 4  # every rank's 7 sums to the two others
    flops = {layer.op: layer for layer in partitioned.plan.layers}["disco.part_of_layer"]
    assert sum(flops.flops) == flops.flops_dense == 2 * 12 * 7


def test_whatever_is_behind_the_heads_runs_everywhere() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    x = torch.randn(1, 3, 4, 4)
    partitioned = disco.partition(grouped, (x,), 2, survivable=True)
    assert len(partitioned.plan.exchanges) == 1
    with torch.inference_mode():
        exact = copy.deepcopy(grouped).double()(x.double())
        for output in partitioned.run_ranks(x):
            error = float((output - exact).abs().max())
            assert error <= TOLERANCE * float(exact.abs().max())
