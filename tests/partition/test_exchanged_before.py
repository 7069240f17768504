"""What an op makes larger is exchanged before it, and made again where it arrives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disco.program import Ref
from tests.partition.harness import Case, check_exact, cut, ownerships
from tests.partition.test_rules import property_test, world_sizes

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")

GROWING = [
    ("aten.upsample_nearest2d.vec", (None, (2.0, 2.0))),
    ("aten.upsample_bilinear2d.vec", ((9, 7), False, None)),
    ("aten.upsample_bicubic2d.vec", (None, True, (2.0, 2.0))),
    ("aten.pad.default", ((1, 1, 1, 1), "reflect")),
    ("aten.expand.default", ((-1, 6, 4, 4),)),
    ("aten.repeat.default", ((1, 1, 2, 2),)),
]


@pytest.mark.parametrize(("kind", "args"), GROWING)
@property_test
@given(st.data(), world_sizes, st.booleans())
def test_read_by_a_layer_and_by_an_op_that_needs_it_whole(
    kind: str, args: tuple[Any, ...], data: st.DataObject, world_size: int, whole: bool
) -> None:
    case = Case(3, *((1, 1) if "expand" in kind else (4, 4)))
    case.conv("a", "x", 6, 3)
    case.op(kind, "u", Ref("a"), *args)
    case.op("aten.gelu.default", "g", Ref("u"))
    if whole:
        case.op("aten.softmax.int", "y", Ref("g"), 1)
    else:
        case.conv("y", "g", 5, 6, kernel=(2, 2), zero_columns=0.5)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(6, world_size))})
    assert plan.exchanges[0].value == "a"
    sizes = case.program().values["a"].shape[2:]
    assert plan.exchanges[0].bytes_per_channel == 8 * int(sizes[0]) * int(sizes[1])


@property_test
@given(st.data(), world_sizes)
def test_an_upsampled_output_is_upsampled_by_every_rank(
    data: st.DataObject, world_size: int
) -> None:
    """The end of a segmentation network: logits travel at the size of the features."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.upsample_bilinear2d.vec", "u", Ref("a"), None, False, (8.0, 8.0))
    outputs = {"low": Ref("a"), "high": Ref("u")}
    owned = {"a": data.draw(ownerships(6, world_size))}
    plan = check_exact(case, world_size, owned, outputs=outputs)
    (exchange,) = plan.exchanges
    assert exchange.value == "a" and exchange.bytes_per_image == (world_size - 1) * 6 * 16 * 8


@property_test
@given(st.data(), world_sizes)
def test_a_pyramid(data: st.DataObject, world_size: int) -> None:
    """Small features are read as they are and up-sampled: one exchange, the union of both."""
    case = Case(3, 4, 4)
    case.conv("top", "x", 6, 3, stride=(2, 2))
    case.conv("head", "top", 4, 6, zero_columns=0.6)
    case.op("aten.upsample_nearest2d.vec", "u", Ref("top"), None, (2.0, 2.0))
    case.conv("lateral", "x", 6, 3, residual=Ref("u"))
    case.conv("smooth", "u", 4, 6, kernel=(3, 3), padding=(1, 1), zero_columns=0.6)
    outputs = (Ref("head"), Ref("lateral"), Ref("smooth"))
    owned = {"top": data.draw(ownerships(6, world_size))}
    plan = check_exact(case, world_size, owned, outputs=outputs)
    (exchange,) = [e for e in plan.exchanges if e.consumers]
    assert exchange.value == "top" and exchange.consumers == ("head", "smooth")


def test_what_shrinks_is_exchanged_behind() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.upsample_nearest2d.vec", "u", Ref("a"), None, (2.0, 2.0))
    case.op("aten.max_pool2d.default", "p", Ref("u"), (4, 4), (4, 4))
    case.conv("b", "p", 5, 6)
    plan, _ = cut(case, 2)
    assert [e.value for e in plan.exchanges] == ["p", "b"]


@property_test
@given(st.data(), st.integers(2, 4), st.booleans())
def test_a_norm_whose_input_is_read_as_well(
    data: st.DataObject, world_size: int, early: bool
) -> None:
    """Raw channels are one exchange; statistics wait for nobody who reads before them."""
    case = Case(4, 5)
    case.linear("a", "x", 7, 5)
    if early:
        case.linear("raw", "a", 6, 7, zero_columns=0.5)
    case.op("aten.layer_norm.default", "n", Ref("a"), (7,), None, None, 1e-5)
    case.op("aten.gelu.default", "g", Ref("n"))
    case.linear("b", "g", 6, 7, zero_columns=0.5)
    case.linear("late", "a", 6, 7, zero_columns=0.5)
    outputs = [Ref("b"), Ref("late"), *([Ref("raw")] if early else [])]
    owned = {"a": data.draw(ownerships(7, world_size))}
    plan = check_exact(case, world_size, owned, outputs=outputs)
    found = {e.value: e.statistics for e in plan.exchanges}
    assert found["a"] == (() if early else ("n.moments",))
    assert ("n.moments" in found) == early and "n" not in found and "g" not in found


@property_test
@given(st.data(), st.integers(2, 4))
def test_two_norms_in_a_row(data: st.DataObject, world_size: int) -> None:
    """The second's statistics are made of the first's result, and cannot travel with them."""
    case = Case(4, 5)
    case.linear("a", "x", 7, 5)
    case.op("aten.layer_norm.default", "n", Ref("a"), (7,), None, None, 1e-5)
    case.op("aten.layer_norm.default", "m", Ref("n"), (7,), case.weight("w", 7), None, 1e-5)
    case.linear("b", "m", 6, 7, zero_columns=0.5)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(7, world_size))})
    assert not plan.replicated
    assert {e.value: e.statistics for e in plan.exchanges}["a"] == ("n.moments",)
