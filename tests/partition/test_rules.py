"""Every rule on its own: exact for any ownership, by property tests over random ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco.executor import Executor, InProcessHub, run_together
from disco.partition import Plan
from disco.partition.norms import merge_norms, split_norms
from disco.partition.reductions import merge_reductions, split_reductions
from disco.program import Ref, WeightRef, interpret
from disco_kernels import ACTIVATIONS, Ownership
from tests.partition.harness import Case, check_exact, cut, ownerships, property_test, world_sizes

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")

channel_counts = st.integers(1, 7)


@property_test
@given(st.data(), world_sizes, channel_counts, channel_counts)
def test_conv2d(data: st.DataObject, world_size: int, inputs: int, outputs: int) -> None:
    case = Case(3, 7, 6)
    case.conv("a", "x", inputs, 3)
    case.conv(
        "b",
        "a",
        outputs,
        inputs,
        kernel=data.draw(st.sampled_from([(1, 1), (3, 3), (2, 3)])),
        stride=data.draw(st.sampled_from([(1, 1), (2, 1), (3, 2)])),
        padding=data.draw(st.sampled_from([(0, 0), (1, 2)])),
        dilation=data.draw(st.sampled_from([(1, 1), (2, 1)])),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        zero_columns=data.draw(st.sampled_from([0.0, 0.6, 1.0])),
    )
    owned = {
        "a": data.draw(ownerships(inputs, world_size)),
        "b": data.draw(ownerships(outputs, world_size)),
    }
    options = data.draw(st.sampled_from(["dense_exchange", "partial_sums", "tolerance"]))
    check_exact(case, world_size, owned, **{options: True if options != "tolerance" else 0.0})


@property_test
@given(st.data(), world_sizes, st.booleans())
def test_conv2d_with_residual(data: st.DataObject, world_size: int, tied: bool) -> None:
    case = Case(2, 4, 4)
    case.conv("a", "x", 5, 2)
    case.conv("b", "a", 5, 5, kernel=(3, 3), padding=(1, 1), residual=Ref("a"), activation="relu")
    owned = {"a": data.draw(ownerships(5, world_size))}
    if not tied:
        owned["b"] = data.draw(ownerships(5, world_size))
    plan = check_exact(case, world_size, owned)
    if tied:
        counts = owned["a"].counts
        assert plan.layers[1].out_counts == counts, "the output takes the residual's ownership"


@property_test
@given(st.data(), world_sizes, channel_counts, channel_counts, st.booleans())
def test_linear(
    data: st.DataObject, world_size: int, inputs: int, outputs: int, tokens: bool
) -> None:
    case = Case(5, 3) if tokens else Case(3)
    case.linear("a", "x", inputs, 3)
    zeros = data.draw(st.sampled_from([0.0, 0.6, 1.0]))
    case.linear("b", "a", outputs, inputs, activation="relu", zero_columns=zeros)
    owned = {
        "a": data.draw(ownerships(inputs, world_size)),
        "b": data.draw(ownerships(outputs, world_size)),
    }
    check_exact(case, world_size, owned)


@property_test
@given(
    st.data(),
    world_sizes,
    st.sampled_from(
        ["aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "aten.maximum.default"]
    ),
    st.sampled_from(["equal", "other", "input", "weight", "map", "number"]),
    st.booleans(),
)
def test_add_and_its_like(
    data: st.DataObject, world_size: int, kind: str, operand: str, swapped: bool
) -> None:
    """Operands of the same ownership, another one, none, without channels, and plain numbers."""
    case = Case(4, 3, 3)
    case.conv("a", "x", 4, 4)
    others: dict[str, Any] = {
        "equal": case.op("aten.tanh.default", "t", Ref("a")),
        "other": case.conv("b", "x", 4, 4),
        "input": Ref("x"),
        "weight": case.weight("shift", 4, 1, 1),
        "map": case.op("aten.mean.dim", "m", Ref("x"), (1,), True),
        "number": 1.5,
    }
    args = (Ref("a"), others[operand])
    if swapped and operand != "number":
        args = (args[1], args[0])
    if operand == "number" and kind == "aten.maximum.default":
        kind = "aten.add.Tensor"
    case.op(kind, "y", *args)
    owned = {
        "a": data.draw(ownerships(4, world_size)),
        "b": data.draw(ownerships(4, world_size)),
    }
    plan = check_exact(case, world_size, owned)
    assert not plan.replicated


@property_test
@given(st.data(), world_sizes)
def test_flatten_before_a_linear(data: st.DataObject, world_size: int) -> None:
    """``[B, C, 2, 3] -> [B, C * 6]``: every channel becomes six consecutive features."""
    case = Case(2, 2, 3)
    case.conv("a", "x", 5, 2)
    case.op("aten.sym_size.int", "n", Ref("x"), 0)
    case.op("aten.view.default", "f", Ref("a"), (Ref("n"), data.draw(st.sampled_from([30, -1]))))
    case.linear("b", "f", 4, 30, zero_columns=0.5)
    owned = {"a": data.draw(ownerships(5, world_size))}
    plan = check_exact(case, world_size, owned)
    assert not plan.replicated
    assert plan.exchanges[0].value == "f"


@property_test
@given(st.data(), world_sizes, st.sampled_from([1, 2]))
def test_cat_of_channels_and_of_maps(data: st.DataObject, world_size: int, dim: int) -> None:
    case = Case(4, 3, 3)
    case.conv("a", "x", 4, 4)
    case.conv("b", "x", 4, 4)
    case.op("aten.cat.default", "c", (Ref("a"), Ref("x"), Ref("b")), dim)
    case.conv("d", "c", 3, 12 if dim == 1 else 4, kernel=(2, 2), zero_columns=0.5)
    owned = {name: data.draw(ownerships(4, world_size)) for name in ("a", "b")}
    plan = check_exact(case, world_size, owned)
    assert not plan.replicated


@property_test
@given(st.data(), world_sizes, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_grouped_convolution(
    data: st.DataObject, world_size: int, group_size: int, per_group: int
) -> None:
    """Local where whole groups are owned; replicated, and said so, where not."""
    groups = 4
    case = Case(2, 4, 4)
    case.conv("a", "x", groups * group_size, 2)
    attributes = {"kernel": (3, 3), "padding": (1, 1), "groups": groups, "activation": "relu"}
    case.conv("b", "a", groups * per_group, groups * group_size, **attributes)
    whole_groups = data.draw(ownerships(groups, world_size))
    if data.draw(st.booleans()):
        channels = tuple(
            tuple(g * group_size + k for g in owned for k in range(group_size))
            for owned in whole_groups.channels
        )
        plan = check_exact(case, world_size, {"a": Ownership(channels)})
        assert not plan.replicated
        assert plan.bytes_per_image == plan.layers[-1].bytes_per_image, "only the output travels"
    else:
        owned = data.draw(ownerships(groups * group_size, world_size))
        check_exact(case, world_size, {"a": owned})


LOCAL = [
    ("aten.relu.default", ()),
    ("aten.hardswish.default", ()),
    ("aten.clamp.default", (-0.5, 0.5)),
    ("aten.gelu.default", ()),
    ("aten.max_pool2d.default", ((2, 2), (2, 2), (1, 1))),
    ("aten.avg_pool2d.default", ((2, 2),)),
    ("aten.adaptive_avg_pool2d.default", ((1, 1),)),
    ("aten.mean.dim", ((2, 3),)),
    ("aten.mean.dim", ((-1,), True)),
    ("aten.amax.default", ((2,),)),
    ("aten.linalg_vector_norm.default", (2, (2, 3), True)),
    ("aten.linalg_vector_norm.default", (1.0, (2,))),
    ("aten.zero.default", ()),
    ("aten.softmax.int", (-1,)),
    ("aten.pad.default", ((1, 2, 0, 1),)),
    ("aten.permute.default", ((0, 2, 3, 1),)),
    ("aten.transpose.int", (1, -1)),
    ("aten.transpose.int", (0, 2)),
    ("aten.unsqueeze.default", (1,)),
    ("aten.unsqueeze.default", (-1,)),
    ("aten.slice.Tensor", (2, 1, 3)),
    ("aten.slice.Tensor", (1, 0, 3)),
    ("aten.slice.Tensor", (-3, 1, 100, 2)),
    ("aten.slice.Tensor", (1, -2)),
    ("aten.pixel_shuffle.default", (1,)),
    ("aten.roll.default", ((1, 2), (2, 3))),
    ("aten.flip.default", ((-1,),)),
    ("aten.select.int", (3, 1)),
    ("aten.layer_norm.default", ((4, 4),)),
    ("aten.upsample_nearest2d.vec", (None, (2.0, 2.0))),
    ("aten.pad.default", ((1, 2, 0, 1), "reflect")),
    ("aten.pad.default", ((1, 2, 0, 1), "replicate")),
    ("aten.expand.default", ((3, -1, 6, 4, 4),)),
    ("aten.repeat.default", ((1, 1, 2, 3),)),
    ("aten.flatten.using_ints", (1, 3)),
    ("aten.flatten.using_ints", (2, -1)),
    ("aten.view.default", ((-1, 6, 16),)),
]
GATHERED = [
    ("aten.flip.default", ((1,),)),
    ("aten.softmax.int", (1,)),
    ("aten.mean.dim", ((1, 2),)),
    ("aten.pad.default", ((0, 0, 0, 0, 1, 0),)),
    ("aten.layer_norm.default", ((6, 4, 4),)),
    ("aten.select.int", (1, 2)),
    ("aten.flatten.using_ints", (0, 1)),
    ("aten.cumsum.default", (1,)),
]


CHANNELS_LAST = [
    ("aten.mean.dim", ((1, 2),)),
    ("aten.mean.dim", ((1,), True)),
    ("aten.sum.dim_IntList", ((-2,),)),
    ("aten.select.int", (1, 0)),
    ("aten.squeeze.dim", (2,)),
    ("aten.squeeze.dims", ((1, 2),)),
    ("aten.unsqueeze.default", (3,)),
    ("aten.unsqueeze.default", (-1,)),
    ("aten.transpose.int", (-1, 1)),
    ("aten.expand.default", ((-1, -1, 3, 6),)),
    ("aten.view.default", ((-1, 4, 6),)),
    ("aten.softmax.int", (1,)),
]


@pytest.mark.parametrize(("kind", "args"), CHANNELS_LAST)
@settings(property_test, max_examples=4)
@given(st.data(), st.integers(2, 3))
def test_local_ops_with_channels_last(
    kind: str, args: tuple[Any, ...], data: st.DataObject, world_size: int
) -> None:
    """Dimensions before the channels come and go, and the channels' number changes with them."""
    case = Case(3, 4, 1)
    case.conv("a", "x", 6, 3)
    case.op("aten.permute.default", "p", Ref("a"), (0, 2, 3, 1))
    case.op(kind, "y", Ref("p"), *args)
    owned = {"a": data.draw(ownerships(6, world_size))}
    plan = check_exact(case, world_size, owned, batches=(2,))
    assert not plan.replicated


def _after_convolution(kind: str, args: tuple[Any, ...], owned: Ownership, world_size: int) -> Plan:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op(kind, "y", Ref("a"), *args)
    return check_exact(case, world_size, {"a": owned}, batches=(2,))


@pytest.mark.parametrize(("kind", "args"), LOCAL)
@settings(property_test, max_examples=6)
@given(st.data(), st.integers(2, 3))
def test_local_ops(kind: str, args: tuple[Any, ...], data: st.DataObject, world_size: int) -> None:
    """Each rank works on its own channels: nothing but the output travels."""
    plan = _after_convolution(kind, args, data.draw(ownerships(6, world_size)), world_size)
    assert not plan.replicated
    assert [e.gathered_by for e in plan.exchanges] == [("output",)]


@pytest.mark.parametrize(("kind", "args"), GATHERED)
@settings(property_test, max_examples=6)
@given(st.data(), st.integers(2, 3))
def test_ops_that_mix_channels_run_replicated(
    kind: str, args: tuple[Any, ...], data: st.DataObject, world_size: int
) -> None:
    """Always right, and the plan names the op and what gathering its input costs."""
    plan = _after_convolution(kind, args, data.draw(ownerships(6, world_size)), world_size)
    (row,) = plan.replicated
    assert row.op == kind and row.note.startswith("no rule for")
    assert row.bytes_per_image == plan.bytes_per_image == (world_size - 1) * 6 * 16 * 8
    assert f"({kind}), {row.note}; gathering its inputs costs" in str(plan)


@property_test
@given(st.data(), world_sizes)
def test_scale_and_shift(data: st.DataObject, world_size: int) -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 5, 3)
    scale, shift = case.weight("scale", 5), case.weight("shift", 5)
    case.op("disco.channel_affine", "y", Ref("a"), scale, shift, activation="relu")
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(5, world_size))})
    assert not plan.replicated


@property_test
@given(st.data(), world_sizes, st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_listed_channels(data: st.DataObject, world_size: int, listed: list[int]) -> None:
    """In any order and more than once: each stays with the rank that has it."""
    case = Case(3, 2, 2)
    case.conv("a", "x", 6, 3)
    case.weights["list"] = torch.tensor(listed, dtype=torch.int32)
    case.op("disco.take", "t", Ref("a"), WeightRef("list"), dim=1)
    case.conv("b", "t", 5, len(listed), zero_columns=0.5)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(6, world_size))})
    assert not plan.replicated


@property_test
@given(st.data(), world_sizes, st.booleans(), st.booleans(), st.sampled_from([0.0, 1e6]))
def test_layer_norm_over_channels(
    data: st.DataObject, world_size: int, weighted: bool, shifted: bool, offset: float
) -> None:
    """Two numbers a token and rank travel with the raw channels; far from zero nothing cancels."""
    case = Case(4, 5)
    case.linear("a", "x", 7, 5)
    case.weights["a.bias"] += offset
    weight = case.weight("norm.weight", 7) if weighted else None
    bias = case.weight("norm.bias", 7) if shifted else None
    case.op("aten.layer_norm.default", "n", Ref("a"), (7,), weight, bias, 1e-5)
    case.linear("b", "n", 6, 7, zero_columns=0.5)
    owned = {"a": data.draw(ownerships(7, world_size)), "b": data.draw(ownerships(6, world_size))}
    program = case.program()
    x = case.input(2)
    if not offset:
        plan = check_exact(case, world_size, owned)
    else:
        # Sums that cancelled would be off by 1e12 roundings, not by the offset's own 1e6.
        plan, ranks = cut(case, world_size, owned)
        expected = interpret(program, case.weights, (x,))
        executors = [Executor(rank.program, rank.weights, backend="reference") for rank in ranks]
        for found in run_together(executors, (x,), InProcessHub(world_size).transports()):
            assert float((found - expected).abs().max()) <= 1e-7 * float(expected.abs().max())
    assert not plan.replicated
    if world_size > 1:
        (exchange,) = (e for e in plan.exchanges if e.value == "a")
        assert exchange.statistics == ("n.moments",), "raw channels and statistics in one message"
        assert sum(map(sum, exchange.statistics_bytes)) == world_size * (world_size - 1) * 4 * 2 * 8
        assert not any(e.value == "n" for e in plan.exchanges)


def test_norms_in_two_ops_and_in_one_again() -> None:
    case = Case(4, 6)
    norm = (case.weight("w", 6), case.weight("b", 6), 1e-6)
    case.op("aten.layer_norm.default", "n", Ref("x"), (6,), *norm)
    case.op("aten.layer_norm.default", "m", Ref("n"), (4, 6))
    program = case.program()
    split = split_norms(program)
    assert [op.kind for op in split.ops] == [
        "disco.moments",
        "disco.normalize",
        "aten.layer_norm.default",
    ]
    assert split.values["n.moments"].shape == ("s0", 4, 2)
    assert merge_norms(split) == program
    x = case.input(3)
    a, b = interpret(program, case.weights, (x,)), interpret(split, case.weights, (x,))
    assert float((a - b).abs().max()) <= 1e-12


@property_test
@given(st.data(), world_sizes)
def test_a_linear_over_another_dimension_than_the_channels(
    data: st.DataObject, world_size: int
) -> None:
    """MLP-Mixer's mixing of tokens: every rank mixes those of its own channels."""
    case = Case(4, 5)
    case.linear("a", "x", 6, 5)
    case.op("aten.transpose.int", "t", Ref("a"), 1, 2)
    case.linear("b", "t", 3, 4)
    case.op("aten.transpose.int", "u", Ref("b"), 1, 2)
    case.linear("c", "u", 5, 6, zero_columns=0.5)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(6, world_size))})
    assert not plan.replicated
    (mixing,) = (layer for layer in plan.layers if layer.value == "b")
    assert sum(mixing.flops) == mixing.flops_dense == 2 * 6 * 4 * 3


@property_test
@given(
    st.data(),
    world_sizes,
    st.sampled_from(
        [
            ("bchw, bcgw -> bchg", True),
            ("bchw,bcgw->gcb", True),
            ("bchw,bcgw->bhg", False),  # a sum over the channels
            ("bchw,bdgw->bcdhg", False),  # each with each
        ]
    ),
)
def test_einsum(data: st.DataObject, world_size: int, way: tuple[str, bool]) -> None:
    equation, local = way
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.conv("b", "x", 6, 3)
    case.op("aten.einsum.default", "y", equation, (Ref("a"), Ref("b")))
    owned = data.draw(ownerships(6, world_size))
    plan = check_exact(case, world_size, {"a": owned, "b": owned}, batches=(2,))
    assert not (local and plan.replicated)


@property_test
@given(st.data(), world_sizes)
def test_addcmul(data: st.DataObject, world_size: int) -> None:
    """Three operands, one of them a weight for every channel."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.relu.default", "r", Ref("a"))
    scale = case.weight("scale", 1, 6, 1, 1)
    case.op("aten.addcmul.default", "y", Ref("a"), scale, Ref("r"))
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(6, world_size))})
    assert not plan.replicated


def test_a_tensor_that_only_lends_its_dtype() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.new_zeros.default", "z", Ref("a"), (4, 4))
    case.op("aten.add.Tensor", "y", Ref("a"), Ref("z"))
    assert not check_exact(case, 2).replicated


@property_test
@given(st.data(), st.integers(2, 4))
def test_one_tensor_with_many_readers_is_exchanged_once(
    data: st.DataObject, world_size: int
) -> None:
    """Two convolutions, one of them twice, and an addition: one exchange, the union of needs."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.conv("b", "a", 5, 6, zero_columns=0.7)
    case.conv("c", "a", 4, 6, kernel=(3, 3), padding=(1, 1), zero_columns=0.7)
    case.op("disco.conv2d", "b2", Ref("a"), *case.ops[1].args[1:], **case.ops[1].kwargs)
    outputs = (Ref("b"), {"c": Ref("c"), "again": Ref("b2")})
    owned = {name: data.draw(ownerships(n, world_size)) for name, n in (("a", 6), ("b", 5))}
    plan = check_exact(case, world_size, owned, outputs=outputs)
    (exchange,) = [e for e in plan.exchanges if e.value == "a"]
    assert exchange.consumers == ("b", "c")
    for i in range(world_size):
        for j in range(world_size):
            rows = [layer.selected_counts[i][j] for layer in plan.layers if layer.name in "bc"]
            assert max(rows) <= len(exchange.sent[i][j]) <= sum(rows)


@property_test
@given(st.data(), st.integers(2, 3))
def test_a_replicated_input_is_read_where_the_weights_are_not_zero(
    data: st.DataObject, world_size: int
) -> None:
    case = Case(6, 4, 4)
    case.conv("a", "x", 4, 6, zero_columns=0.7)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(4, world_size))})
    assert sum(plan.flops_per_rank) <= plan.flops_dense


def test_weights_as_operands_and_as_outputs() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 4, 3)
    case.weight("table", 4)
    plan = check_exact(case, 2, outputs={"y": Ref("a"), "table": WeightRef("table")})
    assert plan.world_size == 2


@property_test
@given(st.data(), world_sizes, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_group_norm(data: st.DataObject, world_size: int, groups: int, affine: bool) -> None:
    """Groups that are cut exchange moments, in one message with the channels that are read."""
    case = Case(3, 3, 2)
    case.conv("a", "x", 8, 3)
    norm = (case.weight("w", 8), case.weight("v", 8)) if affine else (None, None)
    case.op("aten.group_norm.default", "n", Ref("a"), groups, *norm, 1e-5, False)
    case.conv("b", "n", 5, 8, zero_columns=0.5, activation="relu")
    owned = data.draw(ownerships(8, world_size))
    plan = check_exact(case, world_size, {"a": owned})
    assert not plan.replicated
    size = 8 // groups
    held = [{channel // size for channel in own} for own in owned.channels]
    cut = sum(map(len, held)) > groups
    moments = [e for e in plan.exchanges if "n.moments" in e.statistics]
    assert bool(moments) == cut
    for exchange in moments:
        assert exchange.value == "a"
        per_rank = 2 * groups * 8
        assert sum(map(sum, exchange.statistics_bytes)) == per_rank * world_size * (world_size - 1)


def test_outputs_before_a_group_norm_are_shared_out_by_groups() -> None:
    case = Case(3, 3, 2)
    case.conv("a", "x", 12, 3)
    case.op("aten.group_norm.default", "n", Ref("a"), 3)
    plan = check_exact(case, 2)
    assert plan.layers[0].out_counts == (8, 4)
    assert [e.value for e in plan.exchanges] == ["n"], "only the output is gathered"


@property_test
@given(st.data(), world_sizes, st.sampled_from([1, 6]))
def test_weights_of_each_channel(data: st.DataObject, world_size: int, slopes: int) -> None:
    """PReLU, with a slope a channel or one for all, and an instance norm."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.prelu.default", "p", Ref("a"), case.weight("slope", slopes))
    affine = (case.weight("w", 6), case.weight("v", 6), None, None)
    case.op("aten.instance_norm.default", "n", Ref("p"), *affine, True, 0.1, 1e-5, False)
    case.op("aten.upsample_nearest2d.vec", "u", Ref("n"), None, (2.0, 2.0))
    case.conv("b", "u", 5, 6, zero_columns=0.5)
    plan = check_exact(case, world_size, {"a": data.draw(ownerships(6, world_size))})
    assert not plan.replicated
    assert [e.value for e in plan.exchanges[:1]] in (["a"], ["n"], ["p"])


@property_test
@given(st.data(), st.integers(2, 3), st.sampled_from([1, 3]), st.booleans())
def test_attention_with_a_mask(
    data: st.DataObject, world_size: int, heads: int, keyword: bool
) -> None:
    """A bias of relative positions, the same for all heads or one for each."""
    case = Case(5, 4)
    for name in "qkv":
        case.linear(name, "x", 12, 4)
        case.op("aten.view.default", f"{name}v", Ref(name), (-1, 5, 3, 4))
        case.op("aten.permute.default", f"{name}h", Ref(f"{name}v"), (0, 2, 1, 3))
    mask = case.weight("mask", 1, heads, 5, 5)
    qkv = (Ref("qh"), Ref("kh"), Ref("vh"))
    if keyword:
        case.op("aten.scaled_dot_product_attention.default", "s", *qkv, attn_mask=mask)
    else:
        case.op("aten.scaled_dot_product_attention.default", "s", *qkv, mask)
    owned = data.draw(ownerships(3, world_size))
    by_heads = Ownership(
        tuple(tuple(4 * c + k for c in own for k in range(4)) for own in owned.channels)
    )
    plan = check_exact(case, world_size, dict.fromkeys("qkv", by_heads))
    if sum(map(bool, owned.counts)) > 1:  # a rank that has all may have it by any dimension
        assert not plan.replicated


REDUCTIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("aten.sum.dim_IntList", ((1,), True)),
    ("aten.mean.dim", ((1,), True)),
    ("aten.mean.dim", ((-1,),)),
    ("aten.linalg_vector_norm.default", (2.0, (1,), True)),
    ("aten.linalg_vector_norm.default", (2, (1,))),
]


@property_test
@given(st.data(), world_sizes, st.sampled_from(REDUCTIONS))
def test_reductions_over_channels_exchange_one_number_a_rank(
    data: st.DataObject, world_size: int, reduction: tuple[str, tuple[Any, ...]]
) -> None:
    kind, args = reduction
    case = Case(2, 3, 4)
    case.conv("a", "x", 7, 2)
    case.op(kind, "n", Ref("a"), *args)
    owned = {"a": data.draw(ownerships(7, world_size))}
    plan = check_exact(case, world_size, owned)
    assert not plan.replicated
    over_channels = args[-1] != (-1,) and (1,) in args
    if world_size > 1 and over_channels:
        (exchange,) = (e for e in plan.exchanges if e.value == "n.parts")
        assert sum(map(len, exchange.ownership)) == world_size


def test_reductions_are_one_op_again_on_one_machine() -> None:
    case = Case(3, 4)
    for number, (kind, args) in enumerate(REDUCTIONS):
        case.op(kind, f"n{number}", Ref("x"), *args)
    program = case.program()
    split = split_reductions(program)
    assert sum(op.kind == "disco.sum_of_parts" for op in split.ops) == len(REDUCTIONS)
    x = case.input(3)
    merged = merge_reductions(split)
    assert [op.kind for op in merged.ops] == [op.kind for op in program.ops]
    torch.testing.assert_close(
        interpret(split, case.weights, (x,)), interpret(program, case.weights, (x,))
    )
    assert torch.equal(
        interpret(merged, case.weights, (x,)), interpret(program, case.weights, (x,))
    )


@property_test
@given(st.data(), world_sizes, st.booleans())
def test_what_is_held_otherwise_is_sent_where_it_is_needed(
    data: st.DataObject, world_size: int, residual: bool
) -> None:
    """Every rank gets the channels that it lacks, not all; a value may be read in both ways."""
    case = Case(4, 3, 3)
    case.conv("a", "x", 6, 4)
    case.conv("b", "a", 6, 6, zero_columns=0.7, residual=Ref("a") if residual else None)
    case.op("aten.add.Tensor", "y", Ref("b"), Ref("a"))
    case.conv("c", "y", 3, 6)
    owned = {name: data.draw(ownerships(6, world_size)) for name in "ab"}
    plan = check_exact(case, world_size, owned, permute=data.draw(st.booleans()))
    check_exact(case, world_size, owned, partial_sums=True)
    assert not plan.replicated
    (exchange,) = (e for e in plan.exchanges if e.value == "a")
    assert not exchange.gathered_by
    for i, target in enumerate(owned["b"].channels):
        for j, own in enumerate(owned["a"].channels):
            assert i == j or set(exchange.sent[i][j]) >= set(target) & set(own)


@property_test
@given(st.data(), world_sizes, st.integers(-5, 4), st.booleans())
def test_stack(data: st.DataObject, world_size: int, dim: int, tied: bool) -> None:
    case = Case(2, 3, 4)
    case.conv("a", "x", 5, 2)
    case.conv("b", "x", 5, 2)
    case.op("aten.stack.default", "y", (Ref("a"), Ref("b")), dim)
    owned = {"a": data.draw(ownerships(5, world_size))}
    owned["b"] = owned["a"] if tied else data.draw(ownerships(5, world_size))
    plan = check_exact(case, world_size, owned)
    assert not plan.replicated


_LIMITED = {"acos", "asin", "atanh", "erfinv"}  # defined between -1 and 1 only
_POSITIVE = {"acosh", "log2", "log10"}
_OF_ONE_ELEMENT = """
    acos acosh asin asinh atan atanh celu cosh erfc erfinv exp2 frac hardshrink log10 log2
    log_sigmoid logit nan_to_num sgn sinc sinh softshrink square trunc
"""


@pytest.mark.parametrize(
    "name",
    _OF_ONE_ELEMENT.split(),
)
def test_functions_of_one_element_run_where_their_channels_are(name: str) -> None:
    case = Case(3, 4, 4)
    y = case.conv("conv", "x", 5, 3)
    if name in _LIMITED | _POSITIVE | {"logit"}:
        y = case.op("aten.sigmoid.default", "limited", y)
    if name in _POSITIVE:
        y = case.op("aten.add.Scalar", "positive", y, 1.0)
    case.op(f"aten.{name}.default", "y", y)
    ownership = Ownership(((3, 0), (), (4, 1, 2)))
    plan = check_exact(case, 3, {"conv": ownership})
    assert not plan.replicated


@pytest.mark.parametrize(
    "kind", ["atan2.default", "copysign.Tensor", "hypot.default", "max.other", "logaddexp.default"]
)
def test_functions_of_two_elements_run_where_their_channels_are(kind: str) -> None:
    case = Case(3, 4, 4)
    a, b = case.conv("a", "x", 5, 3), case.conv("b", "x", 5, 3)
    case.op(f"aten.{kind}", "y", a, b)
    plan = check_exact(case, 3, {"a": Ownership(((3, 0), (), (4, 1, 2)))})
    assert not plan.replicated
