"""The Triton kernels against float64: on a GPU, else `test_interpreter.py` runs this file in
Triton's interpreter. The cases and bounds are those of the C++ kernels' tests, fewer of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.core import execute
from tests.kernels import oracle
from tests.kernels.cases import (
    OUTPUTS,
    OWNERSHIPS,
    RESIDUALS,
    fits,
    image,
    in_dtype,
    output_of,
    ownership,
    residual_of,
    seed,
    segments,
    selection,
    spec_of,
)
from tests.kernels.covering import Case, pairwise
from tests.triton.device import DEVICE, DTYPES, needs_device, optional_there, there

pytestmark = needs_device

# One of each kind: a pixel, a strided pixel, a padded window, strides, dilation, a wide window.
GEOMETRIES = ((1, 1, 0, 1), (1, 2, 0, 1), (1, 1, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2))
AXES: dict[str, Sequence[object]] = {
    "dtype": DTYPES,
    "outputs": (1, 8, 24, 33, 64, 130),
    "gh": GEOMETRIES,
    "h": (1, 4, 9),
    "gw": GEOMETRIES,
    "w": (1, 5, 8),
    "batch": (0, 1, 3),
    "bias": (False, True),
    "residual": RESIDUALS,
    "activation": dk.ACTIVATIONS,
    "out": OUTPUTS,
}
PARTIAL_AXES = {
    **AXES,
    "inputs": (0, 1, 3, 16, 40, 72),
    "layout": ("w", "c", "p", "v", "h", "i", "d", "e", "s", "wp", "ii", "ipv", "dcv", "es"),
}
GATHER_AXES = {
    **AXES,
    # Nodes of fewer than 64 columns in 16 bits run as one dense layer.
    "outputs": (1, 33, 130, 200),
    "inputs": (3, 16, 64, 80),
    "nodes": (1, 2, 3),
    "density": (0.0, 0.3, 1.0),
    "owned_out": OWNERSHIPS,
    "owned_in": OWNERSHIPS,
    "layout": ("w", "c", "v"),
}
# Kernels are compiled for a GPU: a few cases of each kind there, all of them with `-m slow`.
FEW = 24


def some(axes: dict[str, Sequence[object]], number: int) -> list[tuple[int, Case]]:
    cases = list(enumerate(pairwise(axes, fits)))
    return random.Random(number).sample(cases, min(FEW, len(cases)))


def rounded(expected: oracle.Expected, dtype: torch.dtype) -> oracle.Expected:
    """The result written in ``dtype``: one more rounding, and what float16 cannot hold."""
    if dtype != torch.float16:
        return oracle.rounded(expected, dtype)
    value, bound = expected.value, expected.bound
    # Half of float16's smallest step, and of its last place.
    return oracle.Expected(value, bound + 2.0**-11 * (value.abs() + bound) + 2.0**-25)


def check(y: Tensor, expected: oracle.Expected, dtype: torch.dtype, what: object) -> None:
    assert y.dtype == dtype, what
    # Triton's exp and erf are a few units in the last place of float32.
    value, bound = expected.value, expected.bound
    looser = oracle.Expected(value, bound + 2.0**-20 * value.abs() + 2.0**-24)
    oracle.check(y.cpu(), rounded(looser, dtype), what)


def shape_of(case: Case, spec: dk.ConvSpec) -> tuple[int, ...]:
    return (case["batch"], case["outputs"], *spec.output_size(case["h"], case["w"]))


def compute(kernel: object, case: Case, shape: tuple[int, ...], *inputs: object) -> Tensor:
    """The kernel's result, computed into the kind of output that the case wants."""
    output = output_of(case["out"], shape, case["dtype"])
    target = optional_there(output.target)
    y: Tensor = kernel(*inputs, target)  # type: ignore[operator]
    assert target is None or y is target
    return y


def run_partial(case: Case, number: int) -> None:
    rng = seed(number)
    dtype = case["dtype"]
    spec = spec_of(case["gh"], case["gw"], case["activation"])
    tensors, index = segments(
        case["layout"], case["inputs"], case["batch"], case["h"], case["w"], rng
    )
    tensors = [in_dtype(x, dtype) for x in tensors]
    x = oracle.concatenated(tensors, index, 1)
    weight = torch.randn(case["outputs"], x.shape[1], *spec.kernel_size).to(dtype)
    bias = torch.randn(case["outputs"]).to(dtype) if case["bias"] else None
    shape = shape_of(case, spec)
    residual = residual_of(case["residual"], shape)
    residual = None if residual is None else in_dtype(residual, dtype)
    counts = [
        t.shape[1] if listed is None else listed.numel()
        for t, listed in zip(tensors, index, strict=True)
    ]
    kernel = dk.PartialConv2d(
        there(weight), counts, spec, bias=optional_there(bias), index=index, backend="triton"
    )
    given = [there(x) for x in tensors]
    y = compute(kernel, case, shape, given, optional_there(residual))
    check(y, oracle.conv2d(x, weight, spec, bias, residual), dtype, case)


def run_gather(case: Case, number: int) -> None:
    rng = seed(number)
    dtype = case["dtype"]
    spec = spec_of(case["gh"], case["gw"], case["activation"])
    owned_out = ownership(case["owned_out"], case["outputs"], case["nodes"], rng)
    owned_in = ownership(case["owned_in"], case["inputs"], case["nodes"], rng)
    selected = selection(owned_in, case["density"], rng)
    mask = oracle.on_pattern(
        torch.empty(case["outputs"], case["inputs"]), owned_out, owned_in, selected
    )[:, :, None, None]
    weight = torch.randn(case["outputs"], case["inputs"], *spec.kernel_size).to(dtype)
    bias = torch.randn(case["outputs"]).to(dtype) if case["bias"] else None
    x = in_dtype(image(case["layout"], case["batch"], case["inputs"], case["h"], case["w"]), dtype)
    shape = shape_of(case, spec)
    residual = residual_of(case["residual"], shape)
    residual = None if residual is None else in_dtype(residual, dtype)
    kernel = dk.GatherConv2d(
        there(torch.where(mask, weight, float("nan"))),  # outside the pattern nothing is read
        owned_out,
        owned_in,
        selected,
        spec,
        bias=optional_there(bias),
        backend="triton",
    )
    y = compute(kernel, case, shape, there(x), optional_there(residual))
    check(y, oracle.conv2d(x, weight * mask, spec, bias, residual), dtype, case)


def test_partial_conv2d() -> None:
    for number, case in some(PARTIAL_AXES, 1):
        run_partial(case, number)


def test_gather_conv2d() -> None:
    for number, case in some(GATHER_AXES, 2):
        run_gather(case, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_pair_of_a_partial_conv2d(part: int) -> None:
    for number, case in list(enumerate(pairwise(PARTIAL_AXES, fits)))[part::4]:
        run_partial(case, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_pair_of_a_gather_conv2d(part: int) -> None:
    for number, case in list(enumerate(pairwise(GATHER_AXES, fits)))[part::4]:
        run_gather(case, number)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_selections_in_groups_of_16_bytes(dtype: torch.dtype, kernel: int) -> None:
    """Channels listed in groups take the wide loads; several nodes and tiles, whole vectors out."""
    group = 16 // dtype.itemsize
    rng = seed(kernel)
    own_out, own_in = dk.Ownership.contiguous(72 * 2, 2), dk.Ownership.contiguous(80 * 2, 2)
    selected = []
    for receiver in range(2):
        row: list[tuple[int, ...]] = []
        for owned in own_in.channels:
            groups = [owned[i : i + group] for i in range(0, len(owned), group)]
            chosen = sorted(rng.sample(groups, 3)) if own_in.channels[receiver] != owned else []
            row.append(tuple(c for one in chosen for c in one))
        selected.append(tuple(row))
    mask = oracle.on_pattern(torch.empty(144, 160), own_out, own_in, tuple(selected))
    weight = torch.randn(144, 160, kernel, kernel).to(dtype) * mask[:, :, None, None]
    spec = dk.ConvSpec((kernel, kernel), padding=(kernel // 2,) * 2, activation="relu")
    x = in_dtype(image("w", 2, 160, 9, 7), dtype)
    conv = dk.GatherConv2d(there(weight), own_out, own_in, tuple(selected), spec, backend="triton")
    prepared = conv._prepared
    assert prepared._group([there(x)], prepared.choose(126, there(x).device)) == group  # type: ignore[attr-defined]
    check(conv(there(x)), oracle.conv2d(x, weight, spec), dtype, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_nodes_run_as_one_dense_layer(dtype: torch.dtype) -> None:
    seed(0)
    own_out, own_in = dk.Ownership.contiguous(24, 2), dk.Ownership.contiguous(32, 2)
    selected = (((), (17, 20)), ((3,), ()))
    mask = oracle.on_pattern(torch.empty(24, 32), own_out, own_in, selected)[:, :, None, None]
    weight = torch.randn(24, 32, 3, 3).to(dtype)
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    conv = dk.GatherConv2d(
        there(torch.where(mask, weight, float("nan"))),
        own_out,
        own_in,
        selected,
        spec,
        backend="triton",
    )
    assert len(conv.descriptor.nodes) == (2 if dtype == torch.float32 else 1)
    x = in_dtype(image("w", 2, 32, 6, 7), dtype)
    check(conv(there(x)), oracle.conv2d(x, weight * mask, spec), dtype, "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_few_channels(dtype: torch.dtype) -> None:
    """The sum runs over taps and channels together, from planes or pixels."""
    covered = 0
    for layout in ("c", "w", "v"):
        for channels, outputs in ((3, 64), (1, 20), (8, 33)):
            seed(channels)
            x = in_dtype(image(layout, 2, channels, 17, 15), dtype)
            weight, bias = torch.randn(outputs, channels, 7, 7).to(dtype), torch.randn(outputs)
            spec = dk.ConvSpec((7, 7), (2, 2), (3, 3), activation="relu")
            bias = bias.to(dtype)
            conv = dk.PartialConv2d(
                there(weight), (channels,), spec, bias=there(bias), backend="triton"
            )
            assert conv._prepared._has_few_channels([x], None)  # type: ignore[attr-defined]
            check(conv([there(x)]), oracle.conv2d(x, weight, spec, bias), dtype, layout)
            covered += 1
    assert covered == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_linears(dtype: torch.dtype) -> None:
    covered = 0
    for leading in ((), (5,), (3, 17), (2, 3, 4), (0, 4)):
        x = torch.randn(*leading, 40).to(dtype)
        weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
        kernel = dk.PartialLinear(
            there(weight), (40,), bias=there(bias), activation="gelu", backend="triton"
        )
        expected = oracle.linear(x, weight, bias, activation="gelu")
        check(kernel([there(x)]), expected, dtype, leading)
        covered += 1
    assert covered == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "kernel", "stride", "padding"),
    [(24, 24, 24, 3, 1, 1), (24, 24, 48, 3, 2, 1), (4, 16, 32, 3, 1, 1), (70, 70, 70, 5, 2, 2)],
)
def test_grouped_convolutions(
    dtype: torch.dtype,
    groups: int,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
) -> None:
    seed(groups)
    x = in_dtype(image("w", 2, inputs, 9, 11), dtype)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    spec = dk.ConvSpec((kernel,) * 2, (stride,) * 2, (padding,) * 2, activation="relu6")
    expected = oracle.conv2d(x, weight, spec, bias, groups=groups)
    residual = torch.randn(expected.value.shape).to(dtype)
    expected = oracle.conv2d(x, weight, spec, bias, residual, groups=groups)
    conv = dk.GroupedConv2d(there(weight), groups, spec, bias=there(bias), backend="triton")
    check(conv(there(x), there(residual)), expected, dtype, groups)


def test_a_second_pass_adds_onto_the_first() -> None:
    seed(0)
    local, remote = image("w", 2, 16, 5, 6), image("p", 2, 5, 5, 6)
    weight, bias = torch.randn(20, 21, 3, 3), torch.randn(20)
    y = dk.partial_conv2d(
        [there(local)],
        [None],
        dk.prepack(there(weight[:, :16]), [16], backend="triton"),
        out_channels=20,
        kernel_size=3,
        padding=1,
        bias=there(bias),
        backend="triton",
    )
    dk.partial_conv2d_(
        y,
        [there(remote)],
        [None],
        dk.prepack(there(weight[:, 16:]), [5], backend="triton"),
        kernel_size=3,
        padding=1,
        activation="relu",
        backend="triton",
    )
    spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
    check(y, oracle.conv2d(torch.cat([local, remote], 1), weight, spec, bias), y.dtype, "")


WIRES = (torch.float32, torch.float16, torch.int8) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
LISTS = ([[3, 1, 17], list(range(24))], [[]], [[5] * 7, [], [23, 0]], [list(range(8, 24))])


@pytest.mark.parametrize("wire", WIRES)
def test_messages_are_those_of_the_reference(wire: torch.dtype) -> None:
    covered = 0
    for number, lists in enumerate(LISTS):
        for layout in ("w", "v", "h"):
            seed(number)
            x = image(layout, 2, 24, 5, 7)
            found = dk.GatherPack(lists, "triton", wire_dtype=wire)(there(x))
            wanted = dk.GatherPack(lists, "reference", wire_dtype=wire)(x)
            for message, reference in zip(found, wanted, strict=True):
                same = torch.equal(message.cpu().view(torch.uint8), reference.view(torch.uint8))
                assert same, (lists, layout, message.cpu(), reference)
            covered += 1
    assert covered == 3 * len(LISTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_messages_of_values_of_few_bits(dtype: torch.dtype) -> None:
    """Their products come to ties often, where a fused multiplication and addition rounds
    otherwise. Only a GPU fuses: the interpreter passes in any case."""
    seed(0)
    x = torch.randn(2, 64, 28, 28).to(dtype).to(memory_format=torch.channels_last)
    largest = x.float().abs().amax((2, 3), keepdim=True)
    inverse = torch.full_like(largest, 127) / largest
    fused = (x.double() * inverse.double() + 1.5 * 2**23).float()
    apart = x.float() * inverse + 1.5 * 2**23
    assert int((fused != apart).sum()) > 10  # so they are told apart here
    channels = list(range(0, 64, 3))
    found = dk.GatherPack([channels], "triton", wire_dtype=torch.int8)(there(x))[0]
    wanted = dk.GatherPack([channels], "reference", wire_dtype=torch.int8)(x)[0]
    assert torch.equal(found.cpu(), wanted)


def test_int8_messages_of_values_that_have_no_scale() -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    x[0, 0, 1, 1], x[1, 1, 0, 0], x[:, 2] = float("nan"), float("inf"), 1e-35
    found = dk.GatherPack([[0, 1, 2, 3]], "triton", wire_dtype=torch.int8)(there(x))[0]
    wanted = dk.GatherPack([[0, 1, 2, 3]], "reference", wire_dtype=torch.int8)(x)[0]
    values, scale = dk.message_views(found.cpu(), (2, 3, 3), 4)
    values_wanted, scale_wanted = dk.message_views(wanted, (2, 3, 3), 4)
    assert scale is not None and scale_wanted is not None
    assert torch.equal(values, values_wanted)
    assert torch.equal(scale.nan_to_num(-1), scale_wanted.nan_to_num(-1))


@pytest.mark.parametrize("wire", [None, *WIRES])
def test_messages_beside_the_output(wire: torch.dtype | None) -> None:
    seed(0)
    for lists in ([[3, 1, 17], list(range(24))], [[5] * 3]):
        weight = torch.randn(24, 16, 3, 3)
        pack = dk.GatherPack(lists, "triton", wire_dtype=wire)
        spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
        conv = dk.PartialConv2d(there(weight), (16,), spec, pack=pack, backend="triton")
        x = there(image("w", 2, 16, 5, 6))
        messages = pack.empty_messages((2, 5, 6), torch.float32, x.device)
        y = conv([x], messages=messages)
        wanted = pack(y)
        for message, packed in zip(messages, wanted, strict=True):
            assert torch.equal(message.view(torch.uint8), packed.view(torch.uint8)), lists


@pytest.mark.parametrize("wire", [w for w in WIRES if w != torch.float32])
def test_narrow_segments_are_widened_as_they_are_read(wire: torch.dtype) -> None:
    seed(0)
    local, remote = image("w", 2, 16, 5, 6), image("w", 2, 12, 5, 6)
    message = dk.GatherPack([[1, 3, 5, 7, 9]], "reference", wire_dtype=wire)(remote)[0]
    values, scale = dk.message_views(message, (2, 5, 6), 5)
    payload = values.permute(0, 3, 1, 2)
    exact = payload.float() if scale is None else payload.float() * scale[:, :, None, None]
    weight = torch.randn(20, 21, 3, 3)
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    conv = dk.PartialConv2d(there(weight), (16, 5), spec, backend="triton")
    y = conv([there(local), there(payload)], scale=[None, optional_there(scale)])
    check(y, oracle.conv2d(torch.cat([local, exact], 1), weight, spec), y.dtype, wire)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling(dtype: torch.dtype) -> None:
    x = in_dtype(image("v", 2, 20, 9, 11), dtype)
    window = dk.ConvSpec((3, 3), (2, 2), (1, 1))
    found = dk.MaxPool2d(window, "triton")(there(x))
    assert torch.equal(found.cpu(), F.max_pool2d(x.float(), 3, 2, 1).to(dtype))
    mean = dk.GlobalAvgPool2d("triton")(there(x))
    exact = x.double().mean((2, 3), keepdim=True)
    bound = 101 * 2.0**-24 * x.double().abs().mean((2, 3), keepdim=True)
    check(mean, oracle.Expected(exact, bound), dtype, "mean")


def test_what_does_not_fit_is_refused() -> None:
    x = there(image("w", 1, 8, 3, 3))
    conv = dk.PartialConv2d(
        there(torch.randn(4, 2, 1, 1)), (2,), dk.ConvSpec(), index=[[0, 8]], backend="triton"
    )
    with pytest.raises(ValueError, match="channel 8 of segment 0 is listed, but only 0 to 7"):
        conv([x])
    prepared, descriptor = conv._prepared, conv.descriptor
    with pytest.raises(ValueError, match="pack them again for this backend"):
        execute(prepared, descriptor, [x], x.new_zeros(3), None, None)
    with pytest.raises(ValueError, match="winograd"):
        dk.PartialConv2d(
            there(torch.randn(4, 8, 3, 3)),
            (8,),
            dk.ConvSpec((3, 3), padding=(1, 1), winograd="f2"),
            backend="triton",
        )
    with pytest.raises(registry.BackendUnavailable, match="float32, bfloat16 and float16 only"):
        dk.PartialConv2d(
            there(torch.randn(4, 8, 1, 1).double()), (8,), dk.ConvSpec(), backend="triton"
        )


def test_swapped_modules_run_here() -> None:
    seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 1)
    ).eval()
    for conv in (model[0], model[2]):
        outputs, inputs = conv.weight.shape[:2]
        conv.weight.data[: outputs // 2, inputs // 2 :] = 0  # node 0 reads nothing of node 1
    x = image("w", 2, 16, 6, 5)
    with torch.no_grad():
        wanted = model(x)
        model.to(DEVICE)
        report = dk.swap_(model, nodes=2, backend="triton")
        y = model(there(x))
    assert len(report.swapped) == 2, report
    torch.testing.assert_close(y.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_factors_of_10_bits_are_rounded_and_not_cut_off() -> None:
    """Cut off, every one of these products would be smaller, by 7e-4 on average."""
    seed(0)
    x, weight = torch.rand(2, 64, 6, 6) + 0.5, torch.rand(48, 64, 3, 3) + 0.5
    image_of_3 = torch.rand(2, 3, 9, 9) + 0.5
    first = torch.rand(48, 3, 7, 7) + 0.5
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for given, kernel, size in ((x, weight, 3), (image_of_3, first, 7)):
            spec = dk.ConvSpec((size, size), padding=(size // 2,) * 2)
            conv = dk.PartialConv2d(there(kernel), (kernel.shape[1],), spec, backend="triton")
            last = given.contiguous(memory_format=torch.channels_last)
            exact = oracle.conv2d(given, kernel, spec).value
            error = (conv([there(last)]).cpu().double() - exact) / exact
            assert abs(float(error.mean())) < 5e-5
            assert float(error.abs().max()) < 2.0**-10
            assert float(error.abs().max()) > 2.0**-20, "the factors were not shortened"
        special = torch.full((1, 64, 6, 6), float("inf"))
        special[..., :3] = float("nan")
        spec = dk.ConvSpec((1, 1))
        conv = dk.PartialConv2d(
            there(weight[:, :, :1, :1].contiguous()), (64,), spec, backend="triton"
        )
        y = conv([there(special.contiguous(memory_format=torch.channels_last))]).cpu()
        assert y[..., :3].isnan().all() and (y[..., 3:] == float("inf")).all()
    finally:
        torch.set_float32_matmul_precision(before)
