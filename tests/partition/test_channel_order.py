"""The order in which ranks hold channels: what they send becomes runs, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import disco
from disco.partition import Plan
from disco.partition.channel_order import _by_gray_code, _num_runs
from disco.program import Ref, WeightRef
from disco_kernels import Ownership
from tests.partition.harness import Case, check_exact
from tests.partition.test_rules import property_test

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")


def _same_but_for_the_order(plan: Plan, before: Plan) -> None:
    assert plan.bytes_matrix == before.bytes_matrix
    assert plan.flops_per_rank == before.flops_per_rank
    assert plan.gather_before == before.gather == before.gather_before
    assert plan.gather.channels == before.gather.channels
    assert plan.gather.runs <= before.gather.runs


def test_with_two_ranks_and_nothing_tied_each_message_is_one_run() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 64, 3, activation="relu")
    case.op("aten.max_pool2d.default", "p", Ref("a"), (2, 2))
    case.conv("b", "p", 64, 64, zero_columns=0.99)
    before = check_exact(case, 2)
    plan = check_exact(case, 2, permute=True)
    _same_but_for_the_order(plan, before)
    sent = [row[1 - i] for i, row in enumerate(plan.exchanges[0].sent)]
    assert all(sent) and plan.gather.runs == 2 < before.gather.runs
    assert plan.exchanges[0].value == "p"
    # float64, 8 a line; the selected channels come first.
    assert plan.gather.lines == sum(-(-len(channels) // 8) for channels in sent)
    assert f"{plan.gather.lines} lines of 64 bytes a pixel ({before.gather.lines}" in str(plan)


@property_test
@given(st.integers(1, 4), st.sampled_from([0.5, 0.8, 0.95]), st.integers(0, 5))
def test_all_that_carries_an_order(world_size: int, zeros: float, seed: int) -> None:
    """Residuals, concatenations, slices, depthwise and grouped layers, shuffles, flattening."""
    case = Case(3, 4, 4, seed=seed)
    case.conv("a", "x", 12, 3, activation="relu")
    case.conv("b", "a", 12, 12, zero_columns=zeros, residual=Ref("a"))
    case.op("aten.gelu.default", "g", Ref("b"))
    case.conv("c", "x", 12, 3)
    case.op("aten.add.Tensor", "s", Ref("g"), Ref("c"))
    case.conv("depth", "s", 12, 12, kernel=(3, 3), padding=(1, 1), groups=12)
    case.conv("twice", "depth", 24, 12, groups=12)
    case.conv("d", "twice", 8, 24, zero_columns=zeros)
    case.op("aten.cat.default", "e", (Ref("d"), Ref("x"), Ref("s")), 1)
    case.op("aten.slice.Tensor", "f", Ref("e"), 1, 1, 20, 2)
    case.weights["list"] = torch.tensor([9, 1, 3, 3, 0, 5, 2, 8], dtype=torch.int32)
    case.op("disco.take", "t", Ref("f"), WeightRef("list"), dim=1)
    case.conv("grouped", "t", 8, 8, groups=4)
    case.conv("h", "grouped", 6, 8, zero_columns=zeros)
    case.op("aten.pixel_shuffle.default", "i", Ref("e"), 1)
    case.conv("j", "i", 5, 23, zero_columns=zeros)
    case.op("aten.flatten.using_ints", "k", Ref("j"), 1)
    case.linear("m", "k", 7, 80, zero_columns=zeros)
    outputs = {"h": Ref("h"), "m": Ref("m")}
    before = check_exact(case, world_size, outputs=outputs)
    plan = check_exact(case, world_size, outputs=outputs, permute=True)
    _same_but_for_the_order(plan, before)
    check_exact(case, world_size, outputs=outputs, permute=True, partial_sums=True)


@property_test
@given(st.integers(2, 3), st.integers(0, 5))
def test_norms_and_attention(world_size: int, seed: int) -> None:
    case = Case(5, 6, seed=seed)
    case.linear("a", "x", 12, 6)
    norm = (case.weight("w", 12), case.weight("v", 12))
    case.op("aten.layer_norm.default", "n", Ref("a"), (12,), *norm, 1e-5)
    for name in "qkv":
        case.linear(name, "n", 12, 12, zero_columns=0.6)
        case.op("aten.view.default", f"{name}v", Ref(name), (-1, 5, 3, 4))
        case.op("aten.permute.default", f"{name}h", Ref(f"{name}v"), (0, 2, 1, 3))
    heads = (Ref("qh"), Ref("kh"), Ref("vh"))
    case.op("aten.scaled_dot_product_attention.default", "s", *heads)
    case.op("aten.permute.default", "back", Ref("s"), (0, 2, 1, 3))
    case.op("aten.reshape.default", "flat", Ref("back"), (-1, 5, 12))
    case.linear("proj", "flat", 12, 12, zero_columns=0.6, residual=Ref("a"))
    case.linear("up", "proj", 24, 12, zero_columns=0.6, activation="gelu")
    case.linear("down", "up", 12, 24, zero_columns=0.6, residual=Ref("proj"))
    before = check_exact(case, world_size)
    plan = check_exact(case, world_size, permute=True)
    _same_but_for_the_order(plan, before)
    assert len(plan.replicated) == len(before.replicated)


def test_one_weight_for_several_layers_is_stored_once() -> None:
    """A head over two levels of a pyramid: both levels are held alike."""
    case = Case(3, 4, 4)
    for level in "ab":
        case.conv(level, "x", 16, 3)
    case.conv("c", "a", 16, 16, zero_columns=0.9)
    case.op("disco.conv2d", "d", Ref("b"), *case.ops[-1].args[1:], **case.ops[-1].kwargs)
    case.conv("e", "c", 16, 16, zero_columns=0.9)
    case.op("disco.conv2d", "f", Ref("d"), *case.ops[-1].args[1:], **case.ops[-1].kwargs)
    outputs = (Ref("e"), Ref("f"))
    before = check_exact(case, 2, outputs=outputs)
    plan = check_exact(case, 2, outputs=outputs, permute=True)
    _same_but_for_the_order(plan, before)
    assert plan.gather.runs < before.gather.runs
    # Only positions may differ: int32 of what is sent and of the outputs' order.
    spare = 4 * 2 * 16 * 2
    assert all(
        new <= old + spare
        for new, old in zip(plan.weight_bytes_per_rank, before.weight_bytes_per_rank, strict=True)
    )


def test_an_order_that_was_given_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    pattern = disco.sparsify_(model, 2, 0.5, (x,))
    owned = Ownership(((3, 0, 2, 1), (7, 5, 4, 6)))
    given = disco.partition(model, (x,), 2, ownership={"0": owned}).plan
    assert given.exchanges[0].ownership == owned.channels
    recorded = disco.partition(model, (x,), 2, pattern=pattern).plan
    assert [set(c) for c in recorded.exchanges[0].ownership] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert recorded.gather.runs == 2
    plain = disco.partition(model, (x,), 2, pattern=pattern, permute=False).plan
    assert plain.exchanges[0].ownership == ((0, 1, 2, 3), (4, 5, 6, 7))


@settings(property_test)
@given(st.sets(st.integers(0, 15)))
def test_in_a_gray_code_all_sixteen_classes_have_the_fewest_runs(some: set[int]) -> None:
    order = _by_gray_code(range(16))
    assert _num_runs(order) == 8, "a bit changes 15 times between neighbours, 8 times to one"
    assert sorted(_by_gray_code(some)) == sorted(some)
