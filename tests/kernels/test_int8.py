"""Products of 8-bit integers: exact sums, rounded a few times at the end.

Where an instruction set has none, the same tests see them refused. `test_isa.py` runs this file on
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status
from disco_kernels.quantisation import input_bytes, weight_bytes
from tests.kernels import layers, oracle
from tests.kernels.cases import fits, image, in_dtype, threads
from tests.kernels.cases import spec_of as spec_of_windows
from tests.kernels.covering import Case, covered_pairs, pairwise, possible_pairs
from tests.kernels.layers import run_gather, run_partial

STATUS = extension_status()
needs_extension = pytest.mark.skipif(
    STATUS.error is not None, reason=f"no extension: {STATUS.error}"
)
pytestmark = pytest.mark.usefixtures("poison")
HAS_QUADS = STATUS.error is None and registry.get("cpu").int8_refusal() is None

BF16 = torch.bfloat16
# All of normal inputs, half of them clipped, most of them clipped.
INPUTS = (dk.InputBytes.of_range(-4, 5), dk.InputBytes.of_range(0, 3), dk.InputBytes(0.01, 200))
OF_BYTES: dict[str, Sequence[object]] = {"dtype": (torch.float32, BF16), "bytes": INPUTS}
PARTIAL_AXES = {**layers.PARTIAL_AXES, **OF_BYTES}
GATHER_AXES = {**layers.GATHER_AXES, **OF_BYTES}
SPEC = dk.ConvSpec((3, 3), padding=(1, 1), input_bytes=INPUTS[0])


def spec_of(case: Case) -> dk.ConvSpec:
    spec = spec_of_windows(case["gh"], case["gw"], case["activation"])
    return replace(spec, input_bytes=case["bytes"])


def refused() -> bool:
    """Whether the C++ kernels have no such products here, which they then must say."""
    if HAS_QUADS:
        return False
    with pytest.raises(dk.BackendUnavailable, match="cannot multiply 8-bit.*AVX-512-VNNI"):
        dk.PartialConv2d(torch.zeros(2, 3, 3, 3), [3], SPEC, backend="cpu")
    with pytest.raises(dk.BackendUnavailable, match="compute in bfloat16 or float32"):
        dk.PartialLinear(torch.zeros(2, 3), [3], input_bytes=INPUTS[0], backend="cpu")
    return True


@needs_extension
def test_partial_conv2d_cpu() -> None:
    if refused():
        return
    cases = pairwise(PARTIAL_AXES, fits)
    for number, case in enumerate(cases):
        run_partial(case, spec_of(case), case["dtype"], number)
    assert covered_pairs(PARTIAL_AXES, cases) == possible_pairs(PARTIAL_AXES, fits)


@needs_extension
def test_gather_conv2d_cpu() -> None:
    if refused():
        return
    cases = pairwise(GATHER_AXES, fits)
    for number, case in enumerate(cases):
        run_gather(case, spec_of(case), case["dtype"], number)
    assert covered_pairs(GATHER_AXES, cases) == possible_pairs(GATHER_AXES, fits)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_number_of_channels_cpu(dtype: torch.dtype) -> None:
    """1..130 output and listed input channels: remainders of four, of a vector, of a window."""
    if refused():
        return
    for number in range(1, 131):
        count = number * 37 % 131 or 130
        x = in_dtype(image("w", 1, count + number, 3, 7), dtype)
        listed = torch.randperm(count + number)[:count].to(torch.int32)
        if number % 3:
            listed = listed.sort().values
        spec = dk.ConvSpec(stride=(1, 1 + number % 2), input_bytes=INPUTS[number % 3])
        weight = torch.randn(number, count, 1, 1).to(dtype)
        kernel = dk.PartialConv2d(weight, [count], spec, index=[listed], backend="cpu")
        expected = oracle.conv2d(x[:, listed.long()], weight, spec)
        oracle.check(kernel([x]), oracle.rounded(expected, dtype), (number, count))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_values_beyond_the_range(backend: str, dtype: torch.dtype) -> None:
    """Clipped; an infinity likewise; NaN becomes the lowest byte. Ties go to even."""
    if backend == "cpu" and (STATUS.error is not None or refused()):
        return
    given = dk.InputBytes(0.5, 100)
    values = [0.0, 0.24, 0.25, 0.26, 0.75, 1e9, 3e38, float("inf"), -0.25, -0.75, -50.0, -51.0]
    values += [-3e38, -float("inf"), float("nan"), 77.5, 77.75, 78.0]
    steps = [0, 0, 0, 1, 2, 155, 155, 155, 0, -2, -100, -100, -100, -100, -100, 155, 155, 155]
    x = torch.tensor(values).to(dtype)
    exact = torch.tensor(steps, dtype=torch.float64)
    if dtype == BF16:  # 0.24 and 0.26 are other numbers there
        exact = oracle.in_steps(x, given)
    assert torch.equal(input_bytes(x, given), exact)
    weight = torch.eye(len(values)).to(dtype) * 127
    kernel = dk.PartialLinear(weight, [len(values)], input_bytes=given, backend=backend)
    assert torch.equal(kernel([x[None]])[0], (exact * 0.5 * 127).to(dtype))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_largest_sums_are_exact_cpu(dtype: torch.dtype) -> None:
    """65,536 products of 255 and 127: the most that is allowed."""
    if refused():
        return
    count = 65536
    x = torch.full((1, count), 255.0).to(dtype)
    for sign in (1.0, -1.0):
        weight = torch.full((1, count), 127.0 * sign).to(dtype)
        kernel = dk.PartialLinear(weight, [count], input_bytes=dk.InputBytes(1.0), backend="cpu")
        (found,) = kernel([x]).double().flatten().tolist()
        assert abs(found - sign * count * 255 * 127) <= 2.0**-8 * count * 255 * 127
        assert dtype == BF16 or found == sign * count * 255 * 127
    packing = dk.Packing()
    for spec in (None, packing):
        with pytest.raises(ValueError, match="sum of 65537 products.*another dtype"):
            dk.PartialLinear(
                torch.ones(1, count + 1).to(dtype),
                [count + 1],
                input_bytes=dk.InputBytes(1.0),
                packing=spec,
                backend="cpu",
            )
    packing.finish()
    assert packing.packed_bytes == 0


@needs_extension
def test_weights_without_size_cpu() -> None:
    """Rows of zeros and of denormals, and a row that is one large weight."""
    if refused():
        return
    weight = torch.zeros(4, 6, 1, 1)
    weight[1], weight[2, 3], weight[3] = 1e-40, -1e37, torch.randn(6, 1, 1)
    x = image("w", 1, 6, 4, 4)
    spec = dk.ConvSpec(input_bytes=INPUTS[0])
    y = dk.PartialConv2d(weight, [6], spec, backend="cpu")([x])
    assert bool(y.isfinite().all()) and not y[:, 0].any()
    oracle.check(y, oracle.conv2d(x, weight, spec))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_show(backend: str, value: float) -> None:
    if backend == "cpu" and (STATUS.error is not None or refused()):
        return
    weight = torch.randn(20, 16)
    weight[3, 5] = value
    kernel = dk.PartialLinear(weight, [16], input_bytes=INPUTS[0], backend=backend)
    y = kernel([torch.randn(7, 16)])
    assert bool(y[:, 3].isnan().all()) and int(y.isnan().sum()) == 7


@needs_extension
@pytest.mark.parametrize("wire", [None, torch.float16, torch.int8])
def test_messages_beside_the_output_cpu(wire: torch.dtype | None) -> None:
    """What `GatherPack` makes of the output, bit for bit."""
    if refused():
        return
    for dtype in (torch.float32, BF16):
        pack = dk.GatherPack([[5, 1, 2], [], list(range(19, 3, -1))], wire_dtype=wire)
        x, weight = in_dtype(image("w", 2, 13, 6, 5), dtype), torch.randn(20, 13, 3, 3).to(dtype)
        kernel = dk.PartialConv2d(weight, [13], SPEC, backend="cpu", pack=pack)
        messages = pack.empty_messages((2, 6, 5), dtype)
        y = kernel([x], messages=messages)
        for found, wanted in zip(messages, pack(y), strict=True):
            assert torch.equal(found, wanted)


@needs_extension
def test_received_payloads_cpu() -> None:
    """Segments in a wire dtype are widened, then made bytes."""
    if refused():
        return
    own, payload = image("w", 2, 9, 5, 5), image("w", 2, 6, 5, 5)
    weight = torch.randn(8, 15, 3, 3)
    kernel = dk.PartialConv2d(weight, [9, 6], SPEC, backend="cpu")
    half = payload.half()
    expected = oracle.conv2d(torch.cat([own, half.float()], 1), weight, SPEC)
    oracle.check(kernel([own, half]), expected)
    scale = torch.rand(2, 6) * 0.03 + 0.001
    steps = torch.randint(-127, 128, payload.shape, dtype=torch.int8)
    steps = steps.contiguous(memory_format=torch.channels_last)
    read = torch.cat([own, steps.float() * scale[:, :, None, None]], 1)
    found = kernel([own, steps], scale=[None, scale])
    oracle.check(found, oracle.conv2d(read, weight, SPEC))


@needs_extension
def test_bound_calls_and_threads_cpu() -> None:
    """The same bits by every number of threads, bound and not, whatever the inputs become."""
    if refused():
        return
    for dtype in (torch.float32, BF16):
        weight, x = torch.randn(70, 50, 3, 3).to(dtype), in_dtype(image("w", 2, 50, 9, 9), dtype)
        kernel = dk.PartialConv2d(weight, [50], SPEC, backend="cpu")
        out = torch.empty(2, 9, 9, 70, dtype=dtype).permute(0, 3, 1, 2)
        again = kernel.bind([x], None, out)
        for count in (1, 2, 3):
            x.copy_(torch.randn(x.shape))
            with threads(count):
                again()
                assert torch.equal(kernel([x]), out)
        with threads(1):
            assert torch.equal(kernel([x]), out)


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_ranges_hold_their_ends_and_zero(a: float, b: float) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    given_bytes = dk.InputBytes.of_range(min(a, b), max(a, b))
    ends = torch.tensor([low, high, 0.0])
    found = input_bytes(ends, given_bytes) * given_bytes.scale
    # Half a step for the zero point and half for the value itself.
    assert bool(((found - ends.double()).abs() <= 1.01 * given_bytes.scale).all())
    assert float(found[2]) == 0.0


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 7))
def test_weights_are_within_half_a_step(number: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(number)
    weight = torch.randn(outputs, inputs, 2, 1, generator=generator)
    steps, scale = weight_bytes(weight)
    assert scale.shape == (outputs,) and steps.shape == weight.shape
    error = (steps * scale.double()[:, None, None, None] - weight.double()).abs()
    assert bool((error <= 0.501 * scale.double()[:, None, None, None]).all())
    if inputs:
        assert bool((steps.abs().flatten(1).amax(1) == 127).all())


def test_the_choice_is_a_function_of_the_shape() -> None:
    assert dk.choose_int8(torch.empty(64, 3, 7, 7)) and dk.choose_int8(torch.empty(1000, 2048))
    assert not dk.choose_int8(torch.empty(15, 64, 3, 3))
    assert not dk.choose_int8(torch.empty(64, 3, 1, 1))
    assert not dk.choose_int8(torch.empty(64, 16, 3, 3), groups=2)
    assert not dk.choose_int8(torch.empty(64, 65537)) and dk.choose_int8(torch.empty(64, 65536))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.InputBytes(0.0), "scale must be a normal float32 above zero, given 0.0"),
        (lambda: dk.InputBytes(float("nan")), "scale must be"),
        (lambda: dk.InputBytes(-1.0), "scale must be"),
        (lambda: dk.InputBytes(1.0, 256), "zero_point must be 0 to 255, given 256"),
        (lambda: dk.InputBytes(1.0, -1), "zero_point must be 0 to 255, given -1"),
        (lambda: dk.InputBytes(1.0, 1.5), "zero_point must be a whole number, given 1.5"),
        (lambda: dk.InputBytes("a"), "scale must be a number, given 'a'"),
        (lambda: dk.InputBytes.of_range(1.0, 0.0), "two finite numbers in order"),
        (lambda: dk.InputBytes.of_range(0.0, float("inf")), "two finite numbers in order"),
        (lambda: replace(SPEC, winograd="f2"), "8-bit integers have no Winograd"),
        (
            lambda: dk.GroupedConv2d(torch.zeros(4, 1, 3, 3), 4, SPEC),
            "grouped convolutions have no products of 8-bit integers",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@needs_extension
def test_weights_of_another_kind_are_refused_cpu() -> None:
    if refused():
        return
    weight = torch.randn(8, 16, 3, 3)
    whole = dk.PartialConv2d(weight, [16], SPEC, backend="cpu")
    plain = dk.PartialConv2d(weight, [16], replace(SPEC, input_bytes=None), backend="cpu")
    assert whole.packed_bytes < plain.packed_bytes / 3
    whole._finished = plain.packed_weight, whole._prepared
    with pytest.raises(ValueError, match="8-bit integers: pack them again"):
        whole([image("w", 1, 16, 5, 5)])


def test_auto_winograd_is_off() -> None:
    spec = replace(SPEC, winograd="auto")
    weight, x = torch.randn(16, 16, 3, 3), image("w", 1, 16, 6, 6)
    for backend in ("reference", "cpu"):
        if backend == "cpu" and (STATUS.error is not None or refused()):
            continue
        kernel = dk.PartialConv2d(weight, [16], spec, image_size=(56, 56), backend=backend)
        assert kernel.algorithm == "int8" and kernel.descriptor.spec.winograd == "off"
        oracle.check(kernel([x]), oracle.conv2d(x, weight, spec))


@needs_extension
def test_tokens_of_any_strides_cpu() -> None:
    if refused():
        return
    weight = torch.randn(20, 24)
    kernel = dk.PartialLinear(weight, [24], input_bytes=INPUTS[0], backend="cpu")
    whole = torch.randn(2, 6, 30)
    for x in (whole[:, ::2, 3:27], whole[:, :1, :24].expand(-1, 5, -1), whole[:, :, :24]):
        spec = dk.ConvSpec(input_bytes=INPUTS[0])
        rows = x.reshape(-1, 24)[:, :, None, None]
        expected = oracle.conv2d(rows, weight[:, :, None, None], spec)
        oracle.check(kernel([x]).reshape(rows.shape[0], 20, 1, 1), expected)


def test_the_reference_rounds_the_same_way() -> None:
    for dtype in (torch.float32, torch.float64):
        x, weight = image("w", 2, 6, 5, 5).to(dtype), torch.randn(4, 6, 3, 3).to(dtype)
        bias: Tensor = torch.randn(4).to(dtype)
        kernel = dk.PartialConv2d(weight, [6], SPEC, bias=bias, backend="reference")
        expected = oracle.conv2d(x.float(), weight.float(), SPEC, bias)
        oracle.check(kernel([x]).float(), expected)
