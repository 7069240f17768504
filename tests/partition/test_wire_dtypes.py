"""Payloads in float32, float16, bfloat16 and int8: what arrives, what is counted, what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import disco
from disco import Cluster, Link, Node
from disco.errors import InputError
from disco.executor import Executor, InProcessHub, run_together
from disco.partition import Plan, with_wire_dtype
from disco.partition.plan import PLAN_VERSION
from disco.partition.shards import load_manifest
from disco.partition.wire import wire_of
from disco.program import Op, Program, Ref
from disco.program.message_layout import item_bytes, payload_bytes
from disco_kernels import Ownership, message_numel
from tests.partition.harness import Case, ownerships
from tests.partition.test_older_artifacts import ARTIFACTS
from tests.partition.test_rules import property_test
from tests.partition.wire_harness import WIRES, check_case, check_payloads

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")

world_sizes = st.integers(2, 4)
every_wire = pytest.mark.parametrize("wire", WIRES)


# Small programs in float64, by the reference kernels ------------------------------------------


@property_test
@given(st.data(), world_sizes, st.booleans())
def test_convolutions(data: st.DataObject, world_size: int, sums: bool) -> None:
    """Any ownership, empty ranks too; a residual, a depthwise layer, partial sums."""
    case = Case(3, 5, 6)
    case.conv("a", "x", 7, 3, activation="relu")
    case.conv("w", "a", 7, 7, kernel=(3, 3), padding=(1, 1), zero_columns=0.5, residual=Ref("a"))
    case.conv("d", "w", 7, 1 * 7, kernel=(3, 3), padding=(1, 1), groups=7)
    case.conv("b", "d", 4, 7, stride=(2, 2), zero_columns=0.3)
    owned = {"a": data.draw(ownerships(7, world_size)), "b": data.draw(ownerships(4, world_size))}
    plans = check_case(case, world_size, owned, partial_sums=sums)
    for exchange in plans["int8"].exchanges:
        assert exchange.is_narrow == (exchange.value != "b"), "the output travels as it is"


@property_test
@given(st.data(), world_sizes)
def test_payloads_that_are_replayed(data: st.DataObject, world_size: int) -> None:
    """Pooling and up-sampling of what was received are of the widened values."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.upsample_nearest2d.vec", "u", Ref("a"), None, (2.0, 2.0))
    case.op("aten.max_pool2d.default", "p", Ref("u"), (3, 3), (1, 1), (1, 1))
    case.op("aten.sigmoid.default", "s", Ref("p"))
    case.conv("b", "s", 5, 6, zero_columns=0.4)
    case.conv("c", "a", 5, 6, zero_columns=0.4)
    owned = {"a": data.draw(ownerships(6, world_size))}
    check_case(case, world_size, owned, outputs=(Ref("b"), Ref("c")))


@property_test
@given(st.data(), world_sizes, st.booleans())
def test_norms_with_statistics_behind_the_payload(
    data: st.DataObject, world_size: int, second: bool
) -> None:
    """An odd number of narrow values, then statistics in the value's own dtype, aligned to it."""
    case = Case(9, 5)
    case.linear("a", "x", 7, 5)
    case.op("aten.layer_norm.default", "n", Ref("a"), (7,), None, None, 1e-5)
    case.linear("b", "n", 6, 7, zero_columns=0.5, activation="gelu")
    if second:
        case.linear("c", "b", 5, 6, zero_columns=0.3)
    owned = {"a": data.draw(ownerships(7, world_size))}
    for wire, plan in check_case(case, world_size, owned).items():
        (exchange,) = [e for e in plan.exchanges if e.statistics]
        assert exchange.wire == wire and exchange.statistics == ("n.moments",)


@property_test
@given(st.data(), world_sizes)
def test_whole_values_and_shuffles(data: st.DataObject, world_size: int) -> None:
    """Concatenation, pixel shuffle, an op without a rule, and channels that are held otherwise."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "x", 4, 3)
    case.op("aten.cat.default", "ab", (Ref("a"), Ref("b")), 1)
    case.op("aten.pixel_shuffle.default", "p", Ref("ab"), 2)
    case.op("aten.flip.default", "f", Ref("ab"), (1,))
    case.op("aten.add.Tensor", "sum", Ref("f"), Ref("ab"))
    case.conv("c", "p", 4, 3, kernel=(3, 3), zero_columns=0.4)
    case.conv("e", "sum", 4, 12, zero_columns=0.4)
    owned = {"a": data.draw(ownerships(8, world_size)), "b": data.draw(ownerships(4, world_size))}
    check_case(case, world_size, owned, outputs=(Ref("c"), Ref("e")))


@property_test
@given(st.data(), world_sizes)
def test_values_with_channels_elsewhere(data: st.DataObject, world_size: int) -> None:
    """Channels in the middle, in front and behind of 3 and 4 dimensions, widened where needed."""
    case = Case(4, 3, 5)
    case.linear("a", "x", 6, 5)
    case.op("aten.permute.default", "q", Ref("a"), (0, 1, 3, 2))
    case.op("aten.flip.default", "f", Ref("q"), (2,))
    case.op("aten.permute.default", "r", Ref("a"), (3, 0, 1, 2))
    case.op("aten.flip.default", "g", Ref("r"), (0,))
    case.op("aten.select.int", "s", Ref("a"), 1, 0)
    case.op("aten.flip.default", "h", Ref("s"), (2,))
    owned = {"a": data.draw(ownerships(6, world_size))}
    check_case(case, world_size, owned, outputs=(Ref("f"), Ref("g"), Ref("h")))


# Models in float32, by the kernels of this machine ------------------------------


class Gate(nn.Module):
    """Squeeze-and-excitation: a gate of one number a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.relu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(gate))


class Attention(nn.Module):
    """One block of a vision transformer over 3 x 3 tokens, heads split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


def _models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "gates": nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Gate(16), nn.Conv2d(16, 9, 3)),
        "tokens": nn.Sequential(nn.Conv2d(3, 12, 4, stride=3), Attention(), nn.Linear(12, 5)),
        "residuals": nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1),
            nn.Hardswish(),
            nn.Conv2d(10, 10, 3, padding=1, groups=10),
            nn.Conv2d(10, 14, 1),
            nn.PixelShuffle(1),
            nn.MaxPool2d(2),
            nn.Conv2d(14, 6, 3),
            nn.Flatten(),
            nn.Linear(6 * 9, 7),
        ),
    }


@pytest.mark.parametrize("name", ["gates", "tokens", "residuals"])
@pytest.mark.parametrize("world_size", [2, 3])
@every_wire
@torch.no_grad()
def test_models_in_float32(name: str, world_size: int, wire: str) -> None:
    model = _models()[name].eval()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(b, 3, 10, 10, generator=generator) for b in (1, 3)]
    disco.sparsify_(model, world_size, 0.5, (inputs[0],))
    partitioned = disco.partition(model, (inputs[0],), world_size)
    plan = check_payloads(partitioned.plan, partitioned.ranks, wire, inputs, None)
    narrow = [e for e in plan.exchanges if e.is_narrow]
    assert bool(narrow) == (wire != "float32"), "float32 is what they travel in anyway"
    assert all("output" not in e.gathered_by for e in narrow)


@torch.no_grad()
def test_int8_against_a_simulation_in_float64() -> None:
    """The first layer copies channels, times powers of two: what is sent is exact, and all that is
    left is the rounding of what was received and of sums."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 3, padding=1))
    first, second = model[0], model[1]
    first.weight.zero_()
    for channel in range(8):
        first.weight[channel, channel % 3] = 2.0 ** (channel - 4)
    owned = Ownership(((0, 2, 4, 6), (1, 3, 5, 7))), Ownership(((0, 1, 2), (3, 4, 5)))
    x = torch.randn(2, 3, 5, 5)
    partitioned = disco.partition(
        model,
        (x,),
        2,
        ownership=dict(zip("01", owned, strict=True)),
        partial_sums=False,
        wire_dtype=torch.int8,
    )
    exact = first(x)
    largest = exact.abs().amax((2, 3), keepdim=True)
    sent = (exact * (127 / largest)).round().double() * (largest / 127).double()
    hidden = exact.double()
    expected, bound = [], []
    for rank in range(2):
        inputs = sent.clone()
        inputs[:, list(owned[0].channels[rank])] = hidden[:, list(owned[0].channels[rank])]
        rows = list(owned[1].channels[rank])
        weight, bias = second.weight.double()[rows], second.bias.double()[rows]
        convolve = nn.functional.conv2d
        expected.append(convolve(inputs, weight, bias, padding=1))
        bound.append(convolve(inputs.abs(), weight.abs(), bias.abs(), padding=1))
    # A sum of 72 products and a bias, each input with one rounding more where it was widened.
    unit = torch.finfo(torch.float32).eps / 2
    allowed = (72 + 2) * unit * torch.cat(bound, 1) * 1.01
    for found in partitioned.run_ranks(x):
        assert bool(((found.double() - torch.cat(expected, 1)).abs() <= allowed).all())
    error = (model.double()(x.double()) - torch.cat(expected, 1)).abs().max()
    assert error > 100 * allowed.max(), "the simulation is not just the exact result"


# What is counted, and what stays ------------------------------


@pytest.mark.parametrize("leading", [(1, 4, 5), (3, 7), (2, 1, 1), (0, 3)])
@every_wire
def test_payloads_are_as_large_as_messages(wire: str, leading: tuple[int, ...]) -> None:
    dtype = getattr(torch, wire)
    for channels in (0, 1, 3, 8):
        values = channels * torch.Size(leading).numel()
        scales = leading[0] * channels if wire == "int8" else 0
        wanted = message_numel(dtype, leading, channels) * dtype.itemsize
        assert payload_bytes(wire, values, scales) == wanted
        assert item_bytes(wire) == dtype.itemsize


def _mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Gate(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )
    return model.eval(), torch.randn(2, 3, 8, 8)


def test_only_what_becomes_smaller_is_narrow() -> None:
    """Gates have one number a channel and image, a vector has no images to scale one by one: both
    travel in bfloat16, which is no less exact."""
    model, x = _mixed()
    plan = disco.partition(model, (x,), 2, wire_dtype=torch.int8, partial_sums=False).plan
    wires = {e.elements_per_channel: e.wire for e in plan.exchanges if e.consumers}
    assert wires == {64: "int8", 1: "bfloat16"}
    text = str(plan)
    assert "wire dtype int8: 3 in bfloat16, 1 in int8, 1 as they are; " in text
    assert "d=1.00 int8" in text and "d=1.00 bfloat16" in text


@pytest.mark.parametrize(
    ("dtype", "wanted", "elements", "scales", "wire"),
    [
        ("float32", None, 9, 1, "float32"),
        ("float32", "float32", 9, 1, "float32"),
        ("float32", "float16", 1, 0, "float16"),
        ("float32", "int8", 1, 1, "bfloat16"),
        ("float32", "int8", 4, 1, "bfloat16"),
        ("float32", "int8", 5, 1, "int8"),
        ("float32", "int8", 9, 0, "bfloat16"),
        ("float32", "int8", 9, 9, "bfloat16"),
        ("float64", "float32", 9, 1, "float32"),
        ("bfloat16", "float32", 9, 1, "bfloat16"),
        ("bfloat16", "float16", 9, 1, "bfloat16"),
        ("bfloat16", "int8", 4, 1, "bfloat16"),
        ("bfloat16", "int8", 5, 1, "int8"),
        ("float16", "int8", 9, 0, "float16"),
        ("bool", "int8", 9, 1, "bool"),
        ("int64", "int8", 9, 1, "int64"),
    ],
)
def test_the_fewest_bytes(
    dtype: str, wanted: str | None, elements: int, scales: int, wire: str
) -> None:
    assert wire_of(dtype, wanted, elements, scales) == wire


def test_padding_is_once_a_message() -> None:
    """3 channels of 9 pixels and a scale: 39 bytes an image, in multiples of 4."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1))
    plan = disco.partition(
        model, (torch.randn(2, 3, 3, 3),), 2, wire_dtype=torch.int8, partial_sums=False
    ).plan
    hidden, output = plan.exchanges
    assert (hidden.wire, output.wire) == ("int8", "float32")
    assert [hidden.bytes_for(batch) for batch in (0, 1, 2, 3, 4)] == [0, 80, 160, 240, 312]
    assert hidden.bytes_between(0, 1, 4) == 156 and hidden.bytes_per_channel == 13
    assert [output.bytes_for(batch) for batch in (1, 4)] == [216, 864]


def test_partial_sums_are_chosen_by_the_bytes_that_travel() -> None:
    """8 maps of 2 pixels against 3 sums of 4: in float32 sums are fewer bytes, in int8 inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, (1, 1)), nn.Conv2d(8, 6, 1, stride=1))
    x = torch.randn(1, 3, 1, 2)
    forms = {}
    for wire in (torch.float32, torch.int8):
        plan = disco.partition(model, (x,), 2, wire_dtype=wire).plan
        chosen = [e for e in plan.exchanges if e.consumers]
        other = disco.partition(model, (x,), 2, wire_dtype=wire, partial_sums=False).plan
        assert plan.bytes_per_image <= other.bytes_per_image
        forms[wire] = [e.form for e in chosen]
    assert forms[torch.float32] == ["partial sums"]


def test_dense_exchange_is_the_same_baseline() -> None:
    model, x = _mixed()
    disco.sparsify_(model, 2, 0.25, (x,))
    for wire in WIRES:
        dtype = getattr(torch, wire)
        sparse = disco.partition(model, (x,), 2, wire_dtype=dtype).plan
        dense = disco.partition(model, (x,), 2, wire_dtype=dtype, dense_exchange=True).plan
        assert dense.bytes_per_image == dense.bytes_dense_exchange == sparse.bytes_dense_exchange
        assert sparse.bytes_per_image < dense.bytes_per_image


@pytest.mark.parametrize("wire", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@torch.no_grad()
def test_a_model_in_bfloat16(wire: torch.dtype) -> None:
    """Only int8 is fewer bytes than its own dtype; the kernels in bfloat16 read it widened."""
    model, x = _mixed()
    model, x = model.bfloat16(), x.bfloat16()
    partitioned = disco.partition(model, (x,), 2)
    name = str(wire).removeprefix("torch.")
    plan = check_payloads(partitioned.plan, partitioned.ranks, name, [x[:1], x], None)
    assert any(e.is_narrow for e in plan.exchanges) == (wire == torch.int8)
    assert {e.wire for e in plan.exchanges} <= {"bfloat16", "int8"}


def test_masks_and_indices_travel_as_they_are() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.op("aten.gt.Scalar", "mask", Ref("a"), 0.0)
    case.op("aten.flip.default", "f", Ref("mask"), (1,))
    for wire, plan in check_case(case, 3, outputs=(Ref("f"), Ref("a"))).items():
        assert all(not e.is_narrow for e in plan.exchanges), wire


@torch.no_grad()
def test_values_beyond_a_wire_dtype_are_no_plausible_numbers() -> None:
    """float16 ends at 65504, and an int8 channel with an infinity arrives as NaN."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    for parameter in model.parameters():
        parameter.fill_(1.0)
    x = torch.full((1, 1, 3, 3), 1e5)
    made = {w: disco.partition(model, (x,), 2, wire_dtype=getattr(torch, w)) for w in WIRES}
    assert made["float16"](x).isinf().all() and made["bfloat16"](x).isfinite().all()
    assert not made["int8"](torch.full_like(x, torch.inf)).isfinite().any()
    assert torch.allclose(made["int8"](x), made["float32"](x), rtol=1 / 127)


# The plan and the shards ------------------------------


@every_wire
def test_setting_it_later_is_the_same(tmp_path: Path, wire: str) -> None:
    """And going back gives what there was; files are the same, byte for byte, every time."""
    model, x = _mixed()
    dtype = getattr(torch, wire)
    own = disco.partition(model, (x,), 3, partial_sums=False)
    planned = disco.partition(model, (x,), 3, partial_sums=False, wire_dtype=dtype)
    later = disco.with_wire_dtype(own, dtype)
    assert later.plan == planned.plan
    assert [r.program for r in later.ranks] == [r.program for r in planned.ranks]
    for start in (later, planned):
        back = disco.with_wire_dtype(start, None)
        assert back.plan == own.plan
        assert [r.program for r in back.ranks] == [r.program for r in own.ranks]
    planned.save(tmp_path / "a")
    disco.with_wire_dtype(disco.load(tmp_path / "a"), None).save(tmp_path / "own")
    disco.with_wire_dtype(disco.load(tmp_path / "own"), dtype).save(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert torch.equal(disco.load(tmp_path / "b")(x), planned(x))


def test_memory_and_latency_follow() -> None:
    model, x = _mixed()
    link = Link(10, 0.1)
    cluster = Cluster([Node("a", 10, None, link), Node("b", 5, None, link)])
    own = disco.partition(model, (x,), cluster)
    plan = disco.with_wire_dtype(own, torch.int8).plan
    assert plan.latency is not None and own.plan.latency is not None
    assert plan.latency.exchange_ms < own.plan.latency.exchange_ms
    assert plan.latency.compute_ms == own.plan.latency.compute_ms
    assert [len(fewer.nodes) for fewer in plan.fewer_nodes] == [1]
    for rank, (mine, before) in enumerate(zip(plan.memory, own.plan.memory, strict=True)):
        matrix = plan.bytes_matrix
        assert mine.message_bytes == sum(matrix[rank]) + sum(row[rank] for row in matrix)
        assert mine.message_bytes < before.message_bytes
        assert mine.weight_bytes == before.weight_bytes


@torch.no_grad()
def test_nothing_is_allocated_anew_and_kernels_are_bound() -> None:
    model, x = _mixed()
    made = disco.partition(model, (x,), 2, wire_dtype=torch.int8, partial_sums=False)
    executors = [Executor(r.program, r.weights) for r in made.ranks]
    seen = []
    for _ in range(4):
        run_together(executors, (x[:1],), InProcessHub(2).transports())
        now = []
        for executor, memory in zip(executors, made.plan.memory, strict=True):
            (known,) = executor._buffers._known.values()
            (kept,) = known.free
            buffers = [m for e in kept.exchanges.values() for _, m in (*e.incoming, *e.outgoing)]
            assert sum(message.nbytes for message in buffers) == memory.message_bytes
            now.append(([m.data_ptr() for m in buffers], sorted(kept.activations.bound)))
        seen.append(now)
    assert seen[1] == seen[2] == seen[3] and seen[0][0][0] == seen[1][0][0]
    for rank, executor in zip(made.ranks, executors, strict=True):
        (known,) = executor._buffers._known.values()
        bound = known.free[0].activations.bound
        reading = [op for op in rank.program.ops if "scale" in op.kwargs and op.args[1:]]
        assert reading and len(bound) >= len(reading)


def test_older_readers_and_older_plans() -> None:
    """A program with wire dtypes is of version 2, which older releases refuse; others stay 1."""
    model, x = _mixed()
    own = disco.partition(model, (x,), 2)
    narrow = disco.with_wire_dtype(own, torch.int8)
    assert [r.program.version for r in own.ranks] == [1, 1]
    assert [r.program.version for r in narrow.ranks] == [2, 2]
    content = json.loads(narrow.ranks[0].program.to_json())
    content["version"] = 1
    with pytest.raises(InputError, match="wire dtype, which programs of version 1 do not"):
        Program.from_json(json.dumps(content))
    old = disco.load(ARTIFACTS / "plan-1.2")
    with pytest.raises(InputError, match=r"version 1\.2 .* partition the model again"):
        disco.with_wire_dtype(old, torch.int8)
    assert load_manifest(ARTIFACTS / "plan-1.2").plan == old.plan


@pytest.mark.parametrize("wire", [torch.float64, torch.int16, "int8", 8])
def test_other_wire_dtypes_are_refused(wire: object) -> None:
    model, x = _mixed()
    with pytest.raises(InputError, match="float16.*int8"):
        disco.partition(model, (x,), 2, wire_dtype=wire)  # type: ignore[arg-type]


def test_what_is_no_partition_is_refused() -> None:
    model, _ = _mixed()
    with pytest.raises(InputError, match=r"takes what disco.partition or disco.load returned"):
        disco.with_wire_dtype(model, torch.int8)  # type: ignore[arg-type]


def test_a_damaged_program_is_refused() -> None:
    model, x = _mixed()
    rank = disco.partition(model, (x,), 2, wire_dtype=torch.int8).ranks[0]

    def changed(op: Op) -> Op:
        if op.kind == "disco.exchange" and op.kwargs.get("wire"):
            return replace(op, kwargs={**op.kwargs, "wire": "int4"})
        return op

    program = replace(rank.program, ops=tuple(map(changed, rank.program.ops)))
    with pytest.raises(InputError, match="wire dtype must be one of .*'int4'"):
        Executor(program, rank.weights)

    def of_no_exchange(op: Op) -> Op:
        if op.kind != "disco.payload_scale":
            return op
        return replace(op, args=(Ref(rank.program.inputs[0]), 0))

    program = replace(rank.program, ops=tuple(map(of_no_exchange, rank.program.ops)))
    with pytest.raises(InputError, match="takes the result of an exchange"):
        Executor(program, rank.weights)

    def without_attributes(op: Op) -> Op:
        return replace(op, kwargs={}) if op.kind == "disco.widen" else op

    program = replace(rank.program, ops=tuple(map(without_attributes, rank.program.ops)))
    assert any(op.kind == "disco.widen" for op in program.ops)
    with pytest.raises(InputError, match="cannot be prepared"):
        Executor(program, rank.weights)


def test_the_plan_in_json() -> None:
    model, x = _mixed()
    partitioned = disco.partition(model, (x,), 2, wire_dtype=torch.int8)
    plan = partitioned.plan
    assert with_wire_dtype(plan, partitioned.ranks, "int8") == (plan, partitioned.ranks)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.version == PLAN_VERSION and again.digest == plan.digest
