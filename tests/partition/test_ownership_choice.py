"""Outputs shared out in the units that what follows asks for: heads, groups, gates, shuffles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.partition import decide
from disco.partition.ownership_choice import dealt_out, in_units
from disco.partition.placement import Sharded
from disco.partition.rules.reshape import map_through_view
from disco.partition.shares import Shares
from disco.program import WeightRef
from disco_kernels import Ownership
from tests.partition.harness import Case, check_exact


class Attention(nn.Module):
    """As timm has it: one projection, seen as three times the heads."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, width))


class ByMatmul(Attention):
    """The same, written out."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, width))


class Apart(nn.Module):
    """Queries by a layer of their own, as in PVT; keys and values by another, or by two."""

    def __init__(self, width: int = 24, heads: int = 3, together: bool = False) -> None:
        super().__init__()
        self.heads, self.together = heads, together
        self.stem, self.q = nn.Linear(10, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, width = x.shape
        q = self.q(x[:, :3]).reshape(b, 3, self.heads, -1).permute(0, 2, 1, 3)
        if self.together:
            kv = self.kv(x).reshape(b, n, 2, self.heads, width // self.heads)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            k, v = (
                layer(x).reshape(b, n, self.heads, -1).transpose(1, 2) for layer in (self.k, self.v)
            )
        y = self.attention(q, k, v)
        return x[:, :3] + self.proj(y.transpose(1, 2).reshape(b, 3, width))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class ApartByMatmul(Apart):
    """The same, written out."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v


class Shuffle(nn.Module):
    """A unit of ShuffleNet v2: half of the channels passes by, then all are mixed."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        half = width // 2
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = nn.Conv2d(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.last = nn.Conv2d(half, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        x = torch.cat((left, self.b(torch.relu(self.a(right)))), dim=1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.last(x.split(c // 2, dim=1)[1])


class Gated(nn.Module):
    """A grouped convolution of 5 groups of 4 and a gate of all channels, as in RegNet-Y."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 3, padding=1, groups=5)
        self.fc1, self.fc2, self.c = nn.Conv2d(20, 6, 1), nn.Conv2d(6, 20, 1), nn.Conv2d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        gate = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.c(gate * x)


class Upscale(nn.Module):
    """The end of a super-resolution network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9 * 4, 3, padding=1), nn.Conv2d(9, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.pixel_shuffle(torch.relu(self.a(x)), 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, (2, 7, 24)),
    "attention by matmul": (ByMatmul, (2, 7, 24)),
    "attention of three layers": (Apart, (2, 7, 10)),
    "attention of two layers": (partial(Apart, together=True), (2, 7, 10)),
    "attention of three layers by matmul": (ApartByMatmul, (2, 7, 10)),
    "attention of two layers by matmul": (partial(ApartByMatmul, together=True), (2, 7, 10)),
    "shuffle": (Shuffle, (2, 3, 6, 6)),
    "gated groups": (Gated, (2, 3, 6, 6)),
    "pixel shuffle": (Upscale, (2, 3, 5, 6)),
}


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nothing_is_gathered_and_all_is_exact(name: str, nodes: int) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    before = disco.partition(model, (x,), nodes)
    # Sequences come whole, and the residual of the whole one is cut; nothing else is replicated.
    assert not before.plan.replicated, str(before.plan)
    disco.sparsify_(model, nodes, 0.25, (x,))
    partitioned = disco.partition(model, (x,), nodes)
    for batch in (1, 3):
        given_x = torch.randn(batch, *shape[1:])
        exact = copy.deepcopy(model).double()(given_x.double())
        error = float((partitioned(given_x) - exact).abs().max())
        assert error <= 32 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert str(partitioned.plan) == str(disco.partition(model, (x,), nodes).plan)


class Shuffles(nn.Module):
    """Shuffle units one after the other: in each, half of what comes in is handed on."""

    def __init__(self, units: int = 5, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.units = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 1) for _ in range(units))
        self.last = nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for unit in self.units:
            left, right = x.chunk(2, dim=1)
            x = nn.functional.channel_shuffle(torch.cat((left, unit(right)), dim=1), 2)
        return self.last(x)


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1), (1, 3), (2, 1, 3)])
@torch.no_grad()
def test_what_is_cut_out_leaves_every_rank_its_share(weights: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4, 4)
    captured = capture(Shuffles().eval(), (x,))
    plan = decide(*captured, len(weights), shares=Shares(weights)).plan()
    fed = [layer for layer in plan.layers if layer.name.startswith("units") or layer.name == "last"]
    assert len(fed) == 6
    for layer in fed:
        for counts in (layer.in_counts, layer.out_counts):
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - sum(counts) * weight / sum(weights)) <= 2, layer
    assert not plan.replicated


@given(st.integers(0, 40), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_dealt_out_channels_are_in_proportion_wherever_they_are_cut(
    channels: int, weights: list[int]
) -> None:
    owned = dealt_out(channels, range(len(weights)), weights).channels
    assert sorted(c for own in owned for c in own) == list(range(channels))
    for end in range(channels + 1):
        for own, weight in zip(owned, weights, strict=True):
            assert abs(sum(c < end for c in own) - end * weight / sum(weights)) < len(weights)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_compiled_with_the_pattern_that_sparsify_made(name: str) -> None:
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    disco.sparsify_(model, 2, 0.25, (x,))
    compiled = disco.compile(model, 2, example_inputs=(x,))
    exact = copy.deepcopy(model).double()(x.double())
    assert float((compiled(x) - exact).abs().max()) <= 2e-5 * float(exact.abs().max())
    if name != "pixel shuffle":
        assert compiled.gathered, "no layer skips its zeros"


def test_equal_shares_where_nothing_is_to_be_gained() -> None:
    """Whole groups on two nodes are equal shares already; a chain has no units."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 8, 8, groups=4)
    case.conv("c", "b", 6, 8)
    plan = check_exact(case, 2)
    assert [layer.out_counts for layer in plan.layers[:3]] == [(4, 4), (4, 4), (3, 3)]


def test_a_zero_pattern_outweighs_a_gather() -> None:
    """Weights that were made for equal shares keep them, if the units would exchange more."""
    shape = (1, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 9, 1), nn.PixelShuffle(3)).eval()
    with torch.no_grad():
        weight = model[1].weight
        weight[:5, 32:] = 0
        weight[5:, :32] = 0
    captured = capture(model, (torch.randn(shape),))
    plan = decide(*captured, 2).plan()
    (layer,) = (layer for layer in plan.layers if layer.name == "1")
    assert layer.out_counts == (5, 4)
    assert sum(sum(row) for row in layer.selected_counts) == 0
    with torch.no_grad():
        weight.normal_()
    plan = decide(*capture(model, (torch.randn(shape),)), 2).plan()
    assert not plan.replicated


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data(), st.integers(1, 5))
@settings(max_examples=60)
def test_units_and_views_agree(factors: list[int], data: st.DataObject, nodes: int) -> None:
    """What is shared out along a factor lies along that dimension after the view."""
    place = data.draw(st.integers(0, len(factors) - 1))
    ownership = in_units(factors, place, (1.0,) * nodes)
    assert sorted(c for own in ownership.channels for c in own) == list(range(prod(factors)))
    mapped = map_through_view(Sharded(ownership, 1), ("s0", prod(factors), 5), ("s0", *factors, 5))
    wanted = Ownership.contiguous(factors[place], nodes)
    if factors[place] > 1:
        assert mapped is not None
        own = mapped.ownership.channels
        assert mapped.dim != place + 1 or own == wanted.channels
        # Dimensions of one element in front may take its place; never another one.
        assert (
            mapped.dim == place + 1
            or prod(factors[:place]) == 1
            or nodes == 1
            or any(len(part) == prod(factors) for part in ownership.channels)
        )


def test_shuffles_and_parts_are_spelt_out() -> None:
    captured = capture(Shuffle().eval(), (torch.randn(2, 3, 6, 6),))
    kinds = [op.kind for op in captured.program.ops]
    assert kinds.count("disco.take") == 1 and kinds.count("aten.slice.Tensor") == 3
    assert not {"operator.getitem", "aten.view.default", "aten.transpose.int"} & set(kinds)
    (take,) = (op for op in captured.program.ops if op.kind == "disco.take")
    _, listed = take.args
    assert isinstance(listed, WeightRef)
    order = captured.weights[listed.name]
    assert order.tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
