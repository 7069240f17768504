"""Grouped and depthwise convolutions against float64: every remainder of channels and columns,
every window, borders, strides and dilations, layouts, threads.

`test_isa.py` runs this file once for each instruction set.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status
from disco_kernels.spec import GroupedDescriptor
from tests.kernels import oracle
from tests.kernels.cases import (
    BACKENDS,
    OUTPUTS,
    RESIDUALS,
    bits,
    fits,
    fresh,
    image,
    in_dtype,
    needs_extension,
    residual_of,
    run,
    seed,
    spec_of,
    threads,
)
from tests.kernels.covering import Case, covered_pairs, pairwise, possible_pairs

pytestmark = pytest.mark.usefixtures("poison")

STATUS = extension_status()
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)

# (input, output) channels of a group: depthwise, multipliers, groups that share a vector of 4, 8 or
# 16 lanes and such that do not divide it, groups of a vector and more, and wide ones.
GROUPS = (
    *((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 2), (4, 4), (5, 7), (8, 8), (12, 12)),
    *((16, 16), (17, 20), (1, 40), (24, 24), (3, 70), (66, 52)),
)
# More than a strip of columns: 4, 7 and 14 of them.
COLUMNS = (*oracle.ALL_MAPS, 28, 29, 43)
AXES: dict[str, Sequence[object]] = {
    "groups": (1, 2, 3, 5, 8, 15, 16, 17, 33, 48, 65),
    "per_group": GROUPS,
    "gh": oracle.GEOMETRIES,
    "h": oracle.ALL_MAPS,
    "gw": oracle.GEOMETRIES,
    "w": COLUMNS,
    "batch": (0, 1, 2, 3),
    "bias": (False, True),
    "residual": RESIDUALS,
    "activation": dk.ACTIVATIONS,
    "layout": ("w", "c", "v", "h", "x"),
    "out": OUTPUTS,
}
MOST_CHANNELS = 350  # of a case: float64 takes its time


def allowed(first: str, a: object, second: str, b: object) -> bool:
    if (first, second) == ("groups", "per_group"):
        assert isinstance(a, int) and isinstance(b, tuple)
        return a * max(b) <= MOST_CHANNELS
    return fits(first, a, second, b)


@cache
def cases() -> list[Case]:
    return pairwise(AXES, allowed)


def run_case(case: Case, backend: str, number: int) -> None:
    seed(number)
    spec = spec_of(case["gh"], case["gw"], case["activation"])
    groups, (inputs, outputs) = case["groups"], case["per_group"]
    weight = torch.randn(groups * outputs, inputs, *spec.kernel_size)
    bias = torch.randn(groups * outputs) if case["bias"] else None
    x = image(case["layout"], case["batch"], groups * inputs, case["h"], case["w"])
    shape = (case["batch"], groups * outputs, *spec.output_size(case["h"], case["w"]))
    residual = residual_of(case["residual"], shape)
    kernel = dk.GroupedConv2d(weight, groups, spec, bias=bias, backend=backend)
    y = run(lambda out: kernel(x, residual, out), case["out"], shape, case, backend)
    oracle.check(y, oracle.conv2d(x, weight, spec, bias, residual, groups=groups), case)
    if case["out"] == "fresh":
        assert y.is_contiguous(memory_format=torch.channels_last), case


@both_backends
def test_grouped_conv2d(backend: str) -> None:
    for number, case in enumerate(cases()):
        run_case(case, backend, number)
    assert covered_pairs(AXES, cases()) == possible_pairs(AXES, allowed)
    assert len(cases()) >= len(oracle.GEOMETRIES) * len(COLUMNS)


@needs_extension
def test_every_number_of_channels_and_columns_cpu() -> None:
    """All remainders of vectors and strips, with each window that has kernels of its own."""
    windows = ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (4, 1), (3, 3))
    covered: set[tuple[int, int]] = set()
    for number in range(7 * 43):
        seed(number)
        kernel_size, stride = windows[number % 7]
        channels, columns = number % 83 + 1, number % 43 + 1
        spec = dk.ConvSpec((3, kernel_size), (stride, stride), (1, kernel_size // 2))
        weight = torch.randn(channels, 1, *spec.kernel_size)
        x = image("w", 1, channels, 4, columns)
        kernel = dk.GroupedConv2d(weight, channels, spec, backend="cpu")
        y = run(fresh(kernel, x), "fresh", (), (channels, columns, windows[number % 7]), "cpu")
        oracle.check(y, oracle.conv2d(x, weight, spec, groups=channels), (channels, columns))
        covered.add((number % 7, columns))
    assert len(covered) == 7 * 43


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_pixels_that_share_cache_sets_cpu(dtype: torch.dtype) -> None:
    """Pixels a multiple of 2 KB apart are copied before they are read."""
    covered = 0
    for pitch, groups, inputs, outputs in (
        (1024, 1024, 1, 1),
        (1024, 40, 1, 1),
        (512, 128, 4, 4),
        (512, 30, 17, 20),
        (2048, 7, 5, 9),
    ):
        for stride, dilation in ((1, 1), (2, 1), (1, 3)):
            channels = groups * inputs
            spec = dk.ConvSpec((3, 3), (stride, stride), (2, 1), (dilation, dilation), "relu")
            x = in_dtype(torch.randn(2, 6, 17, pitch), dtype).permute(0, 3, 1, 2)[:, :channels]
            weight = in_dtype(torch.randn(groups * outputs, inputs, 3, 3), dtype)
            kernel = dk.GroupedConv2d(weight, groups, spec, backend="cpu")
            y = run(fresh(kernel, x), "fresh", (), (pitch, groups), "cpu", dtype)
            expected = oracle.conv2d(x, weight, spec, groups=groups)
            oracle.check(y, oracle.rounded(expected, dtype), (pitch, groups, stride, dilation))
            covered += 1
    assert covered == 15


@both_backends
def test_bfloat16(backend: str) -> None:
    """Activations and weights are bfloat16; the C++ kernels sum in float32 and round once."""
    chosen = [case for case in cases() if case["batch"]][::3]
    for number, case in enumerate(chosen):
        seed(number)
        spec = spec_of(case["gh"], case["gw"], case["activation"])
        groups, (inputs, outputs) = case["groups"], case["per_group"]

        def bf16(x: Tensor) -> Tensor:
            return in_dtype(x, torch.bfloat16)

        weight = bf16(torch.randn(groups * outputs, inputs, *spec.kernel_size))
        bias = bf16(torch.randn(groups * outputs)) if case["bias"] else None
        x = bf16(image(case["layout"], case["batch"], groups * inputs, case["h"], case["w"]))
        shape = (case["batch"], groups * outputs, *spec.output_size(case["h"], case["w"]))
        residual = residual_of(case["residual"], shape)
        residual = None if residual is None else bf16(residual)
        kernel = dk.GroupedConv2d(weight, groups, spec, bias=bias, backend=backend)

        def call(
            out: Tensor | None,
            kernel: dk.GroupedConv2d = kernel,
            x: Tensor = x,
            residual: Tensor | None = residual,
        ) -> Tensor:
            return kernel(x, residual, out)

        y = run(call, case["out"], shape, case, backend, torch.bfloat16)
        assert y.dtype == torch.bfloat16
        if backend == "cpu":
            expected = oracle.conv2d(x, weight, spec, bias, residual, groups=groups)
            oracle.check(y, oracle.rounded(expected, torch.bfloat16), case)
    assert len(chosen) > 60


@needs_extension
def test_wide_groups_take_winograd_cpu() -> None:
    """As nodes of the dense core; "auto" leaves narrow ones to their own kernel."""
    auto = dk.ConvSpec((3, 3), padding=(1, 1), winograd="auto")
    weight = torch.randn(132, 66, 3, 3)
    # (channels of a group, edge of the map) and what is chosen, whatever the instruction set.
    chosen = {(66, 28): "f4", (66, 14): "f2", (40, 28): "f4", (17, 28): "f4", (17, 14): "f2"}
    chosen |= {(15, 28): "off", (1, 28): "off", (66, 7): "off"}
    for (width, edge), winograd in chosen.items():
        x, part = image("w", 1, 2 * width, edge, edge), weight[: 2 * width, :width]
        kernel = dk.GroupedConv2d(part, 2, auto, image_size=(edge, edge), backend="cpu")
        assert kernel.descriptor.spec.winograd == winograd, (width, edge)
        y = run(fresh(kernel, x), "fresh", (), (width, edge), "cpu")
        oracle.check(y, oracle.conv2d(x, part, kernel.descriptor.spec, groups=2), (width, edge))
        # Asked for by name, it is had for groups of any width.
        for named in ("off", "f2", "f4"):
            spec = replace(auto, winograd=named)
            y = dk.GroupedConv2d(part, 2, spec, backend="cpu")(x)
            oracle.check(y, oracle.conv2d(x, part, spec, groups=2), (width, edge, named))
    assert dk.GroupedConv2d(weight, 2, auto, backend="cpu").descriptor.spec.winograd == "off"


@both_backends
@pytest.mark.parametrize("inputs", [1, 4, 17])
def test_nan_and_infinity_propagate_as_in_torch(backend: str, inputs: int) -> None:
    spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = image("w", 2, 6 * inputs, 13, 11)
        x[0, 2, 4, 5] = x[1, 5, 0, 0] = bad
        weight, bias = torch.randn(6 * inputs, inputs, 3, 3), torch.randn(6 * inputs)
        residual = image("w", 2, 6 * inputs, 13, 11)
        residual[0, -1, 12, 10] = bad
        kernel = dk.GroupedConv2d(weight, 6, spec, bias=bias, backend=backend)
        y = run(fresh(kernel, x, residual), "fresh", (), bad, backend)
        oracle.check(y, oracle.conv2d(x, weight, spec, bias, residual, groups=6), bad)
        wanted = (F.conv2d(x, weight, bias, padding=1, groups=6) + residual).relu()
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())


@needs_extension
def test_threads_do_not_show_where_zero_matters_cpu() -> None:
    """Taps that a border leaves out or reads as zero: infinite weights, not numbers, -0."""
    chosen = [case for case in cases() if case["per_group"] in ((1, 1), (4, 4)) and case["batch"]]
    for number, case in enumerate(chosen):
        seed(number)
        spec = spec_of(case["gh"], case["gw"], "none")
        groups, (inputs, outputs) = case["groups"], case["per_group"]
        weight = torch.randn(groups * outputs, inputs, *spec.kernel_size)
        weight[0, 0, 0, 0], weight[-1, 0, -1, -1] = float("inf"), float("nan")
        bias = torch.full((groups * outputs,), -0.0)
        kernel = dk.GroupedConv2d(weight, groups, spec, bias=bias, backend="cpu")
        x = image("w", case["batch"], groups * inputs, case["h"], case["w"])
        run(fresh(kernel, x), "fresh", (), case, "cpu")
    assert len(chosen) > 30


@needs_extension
def test_denormal_weights_are_packed_as_zero_cpu() -> None:
    weight = torch.full((3, 1, 1, 1), 1e-39)
    kernel = dk.GroupedConv2d(weight, 3, dk.ConvSpec(), backend="cpu")
    assert torch.count_nonzero(kernel(torch.full((1, 3, 1, 1), 1e38))) == 0


@both_backends
def test_the_operator_gives_the_same_bits(backend: str) -> None:
    """`grouped_conv2d`, copies, pickles and bound calls are one core with the prepared kernel."""
    covered = 0
    for groups, inputs, outputs in ((40, 1, 1), (6, 4, 4), (2, 66, 70)):
        spec = dk.ConvSpec((3, 2), (2, 1), (1, 0), (1, 2), "hardswish")
        x, weight = (
            image("w", 2, groups * inputs, 9, 8),
            torch.randn(groups * outputs, inputs, 3, 2),
        )
        bias = torch.randn(groups * outputs)
        kernel = dk.GroupedConv2d(weight, groups, spec, bias=bias, backend=backend)
        y = kernel(x)
        z = dk.grouped_conv2d(
            x,
            dk.prepack_grouped(weight, groups, backend=backend),
            out_channels=groups * outputs,
            groups=groups,
            kernel_size=(3, 2),
            stride=(2, 1),
            padding=(1, 0),
            dilation=(1, 2),
            bias=bias,
            activation="hardswish",
            backend=backend,
        )
        assert torch.equal(y, z)
        assert torch.equal(copy.deepcopy(kernel)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(kernel))(x), y)
        repeated: Callable[[], None] = kernel.bind(x, None, z.zero_())
        assert torch.equal(y, z)
        for count in (2, 1):
            x.copy_(torch.randn_like(x))
            with threads(count):
                repeated()
            assert torch.equal(z, kernel(x)) and not torch.equal(z, y)
        with pytest.raises(ValueError, match="cannot be bound"):
            kernel.bind(x.contiguous(), None, z)
        assert kernel.out_channels == groups * outputs and kernel.packed_bytes > 0
        covered += 1
    assert covered == 3


@needs_extension
def test_a_backend_without_its_own_runs_groups_as_nodes_cpu() -> None:
    """What `Backend` offers by itself, for backends to come."""
    backend, base = registry.get("cpu"), registry.Backend
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    x, weight = image("w", 2, 12, 6, 5), torch.randn(18, 4, 3, 3)
    descriptor = GroupedDescriptor(spec, 3, 4, 6)
    packed = base.prepack_grouped(backend, weight, descriptor)
    assert packed.numel() == base.grouped_numel(backend, descriptor, torch.float32)
    assert base.groups_as_nodes(backend, descriptor, torch.float32)
    assert not backend.groups_as_nodes(descriptor, torch.float32)
    out = image("w", 2, 18, 6, 5)
    prepared = base.prepare_grouped(backend, descriptor, torch.float32)
    prepared.run([x], packed, None, None, out, False)
    oracle.check(out, oracle.conv2d(x, weight, spec, groups=3))


@needs_extension
def test_many_threads_calling_one_kernel_cpu() -> None:
    kernel = dk.GroupedConv2d(
        torch.randn(40, 1, 5, 5), 40, dk.ConvSpec((5, 5), padding=(2, 2)), backend="cpu"
    )
    inputs = [image("w", 1, 40, 5 + i % 7, 9) for i in range(48)]
    wanted = [kernel(x) for x in inputs]
    with threads(2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(kernel, inputs))
    assert sum(torch.equal(bits(a), bits(b)) for a, b in zip(wanted, found, strict=True)) == 48


@both_backends
def test_bad_input(backend: str) -> None:
    x, weight = image("w", 2, 12, 7, 5), torch.randn(18, 4, 3, 3)
    packed = dk.prepack_grouped(weight, 3, backend=backend)
    other = dk.prepack_grouped(torch.randn(18, 4, 3, 1), 3, backend=backend)
    spec = dk.ConvSpec((3, 3))

    def call(**changed: object) -> Tensor:
        given = {"x": x, "packed_weight": packed, "out_channels": 18, "groups": 3, **changed}
        return dk.grouped_conv2d(kernel_size=3, backend=backend, **given)  # type: ignore[arg-type]

    def prepared(weight: Tensor = weight, groups: int = 3, **options: object) -> dk.GroupedConv2d:
        return dk.GroupedConv2d(weight, groups, spec, backend=backend, **options)  # type: ignore[arg-type]

    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: call(groups=5), "groups must divide the 12 input and 18 output channels, given 5"),
        (lambda: call(groups=0), "groups must divide .* given 0"),
        (lambda: call(groups=-3), "groups must divide .* given -3"),
        (lambda: call(out_channels=0), "at least one group"),
        (lambda: call(groups=6), "packed weights"),
        (lambda: call(packed_weight=other), "packed weights"),
        (lambda: call(packed_weight=packed[:-1]), "packed weights"),
        (lambda: call(x=x[:, :6]), "packed weights"),
        (lambda: call(x=x[0]), r"x must be \[B, C, H, W\], given 3 dimensions"),
        (lambda: call(x=x.double()), "convert one of them"),
        (lambda: call(x=x[:, :, :2]), "smaller than the kernel's window"),
        (lambda: call(bias=torch.randn(12)), r"bias must be \[18\]"),
        (lambda: call(residual=image("w", 2, 18, 7, 5)), r"residual must be \[2, 18, 5, 3\]"),
        (lambda: call(activation="tanh"), "activation must be one of"),
        (lambda: dk.prepack_grouped(weight, 4, backend=backend), "groups must divide .* given 4"),
        (lambda: dk.prepack_grouped(weight[0], 3, backend=backend), r"\[O, I / groups, kh, kw\]"),
        (lambda: dk.prepack_grouped(weight[:, :0], 3, backend=backend), "at least one group"),
        (lambda: prepared(weight[:, :, :2]), r"weight must be \[O, I / groups, 3, 3\]"),
        (lambda: prepared(groups=4), "groups must divide the 16 input and 18 output channels"),
        (lambda: prepared(bias=torch.randn(12)), r"bias must be \[18\] .*, given \[12\]"),
        (lambda: prepared()(x[:, :9]), "x must have 12 channels, given 9"),
        (lambda: prepared()(image("w", 2, 16, 7, 5)), "x must have 12 channels, given 16"),
        (lambda: prepared()(x, out=image("c", 2, 18, 5, 3)), "channel stride of 1"),
    ]
    for number, (attempt, message) in enumerate(attempts):
        with pytest.raises(ValueError, match=message) as raised:
            attempt()
        assert len(str(raised.value).splitlines()) == 1, number
    assert len(attempts) == 23
