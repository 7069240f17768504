"""The rules of views and shuffles of pixels: where channels are split, merged or put elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import disco
from disco.program import Ref
from disco_kernels import Ownership
from tests.partition.harness import Case, check_exact, ownerships, property_test, world_sizes

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")


@property_test
@given(st.data(), world_sizes, st.booleans())
def test_pixel_shuffle(data: st.DataObject, world_size: int, whole: bool) -> None:
    """Local by whole output channels, else gathered."""
    case = Case(3, 2, 3)
    case.conv("a", "x", 12, 3)
    case.op("aten.pixel_shuffle.default", "y", Ref("a"), 2)
    case.conv("b", "y", 4, 3)
    owned = data.draw(ownerships(3 if whole else 12, world_size))
    if whole:
        owned = Ownership(
            tuple(tuple(4 * c + k for c in own for k in range(4)) for own in owned.channels)
        )
    plan = check_exact(case, world_size, {"a": owned})
    assert not (whole and plan.replicated)


@settings(property_test, max_examples=10)
@given(st.data(), st.integers(2, 3), st.sampled_from([1, 2, 4]))
def test_view_that_splits_channels(data: st.DataObject, world_size: int, block: int) -> None:
    """Local where ranks own whole blocks, in order; else gathered. Exact either way."""
    case = Case(3, 2, 2)
    case.conv("a", "x", 8, 3)
    case.op("aten.view.default", "y", Ref("a"), (-1, 8 // block, block, 2, 2))
    contiguous = data.draw(st.booleans())
    owned = Ownership.contiguous(8, world_size)
    if not contiguous:
        owned = data.draw(ownerships(8, world_size))
    plan = check_exact(case, world_size, {"a": owned})
    if contiguous and all(count % block == 0 for count in owned.counts):
        assert not plan.replicated


@settings(property_test, max_examples=12)
@given(
    st.data(), world_sizes, st.sampled_from(["aten._unsafe_view.default", "aten.reshape.default"])
)
def test_view_that_merges_neighbours_into_channels(
    data: st.DataObject, world_size: int, kind: str
) -> None:
    """``[B, H, W, C] -> [B, H / 2, W / 2, 4 * C]``, as between the stages of a Swin transformer."""
    case = Case(4, 6, 3)
    case.linear("a", "x", 5, 3)
    case.op("aten.view.default", "split", Ref("a"), (-1, 2, 2, 3, 2, 5))
    case.op("aten.permute.default", "moved", Ref("split"), (0, 1, 3, 4, 2, 5))
    case.op(kind, "merged", Ref("moved"), (-1, 2, 3, 20))
    norm = (case.weight("w", 20), case.weight("v", 20))
    case.op("aten.layer_norm.default", "n", Ref("merged"), (20,), *norm)
    case.linear("b", "n", 6, 20, zero_columns=0.6)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(5, world_size))})
    assert not plan.replicated


def test_view_that_merges_images_into_channels() -> None:
    """Their number is open, so this is no dimension that could be shared out: gathered."""
    case = Case(2, 3)
    case.linear("a", "x", 4, 3)
    case.op("aten.view.default", "y", Ref("a"), (-1,))
    plan = check_exact(case, 2)
    assert [op.name for op in plan.replicated] == ["y"]


class _WritesInPlace(nn.Module):
    """Into the first channels, into some in the middle, and over the borders of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convs
        y = first(x)
        y[:, :5] += x[:, :5]
        z = second(y)
        z[:, 4:9] = y[:, :5] * 2
        z[:, :, 1:-1] *= 0.5
        return third(z)


@pytest.mark.parametrize("nodes", [2, 3])
def test_what_is_written_in_place_stays_sharded(nodes: int) -> None:
    torch.manual_seed(0)
    model, x = _WritesInPlace().eval(), torch.randn(2, 12, 6, 6)
    disco.sparsify_(model, nodes, 0.2, (x,))
    partitioned = disco.partition(model, (x,), nodes)
    assert not partitioned.plan.replicated
    with torch.no_grad():
        torch.testing.assert_close(partitioned(x), model(x), atol=1e-5, rtol=1e-5)
