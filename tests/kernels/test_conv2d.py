"""The convolutions and linears against float64, over every remainder, layout and border.

`test_isa.py` runs this file once for each instruction set. Every number of threads must give the
same bits in every case, outputs start as NaN, and what lies around an output must stay untouched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels import oracle
from tests.kernels.cases import (
    BACKENDS,
    OUTPUTS,
    OWNERSHIPS,
    RESIDUALS,
    SEGMENT_LAYOUTS,
    bits,
    fits,
    fresh,
    image,
    needs_extension,
    ownership,
    residual_of,
    run,
    seed,
    segments,
    selection,
    spec_of,
    threads,
)
from tests.kernels.covering import Case, covered_pairs, pairwise, possible_pairs
from tests.kernels.process import python

pytestmark = pytest.mark.usefixtures("poison")

STATUS = extension_status()
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)

GEOMETRY_AXES: dict[str, Sequence[object]] = {
    "gh": oracle.GEOMETRIES,
    "h": oracle.ALL_MAPS,
    "gw": oracle.GEOMETRIES,
    "w": oracle.ALL_MAPS,
    "batch": (0, 1, 2, 3, 5),
    "bias": (False, True),
    "residual": RESIDUALS,
    "activation": dk.ACTIVATIONS,
    "out": OUTPUTS,
}
PARTIAL_AXES: dict[str, Sequence[object]] = {
    "outputs": oracle.SOME_OUT_CHANNELS,
    "inputs": oracle.SOME_IN_CHANNELS,
    "layout": SEGMENT_LAYOUTS,
    **GEOMETRY_AXES,
}
GATHER_AXES: dict[str, Sequence[object]] = {
    "outputs": oracle.SOME_OUT_CHANNELS,
    "inputs": oracle.SOME_IN_CHANNELS,
    "nodes": (1, 2, 3, 4),
    "density": (0.0, 0.3, 1.0),
    "owned_out": OWNERSHIPS,
    "owned_in": OWNERSHIPS,
    "layout": ("w", "c", "v", "h", "x"),
    **GEOMETRY_AXES,
}
EVERY_CHANNEL = {"outputs": oracle.ALL_OUT_CHANNELS, "inputs": oracle.ALL_IN_CHANNELS}


@cache
def partial_cases() -> list[Case]:
    return pairwise(PARTIAL_AXES, fits)


@cache
def gather_cases() -> list[Case]:
    return pairwise(GATHER_AXES, fits)


def run_partial(case: Case, backend: str, number: int) -> None:
    rng = seed(number)
    spec = spec_of(case["gh"], case["gw"], case["activation"])
    tensors, index = segments(
        case["layout"], case["inputs"], case["batch"], case["h"], case["w"], rng
    )
    x = oracle.concatenated(tensors, index, 1)
    weight = torch.randn(case["outputs"], x.shape[1], *spec.kernel_size)
    bias = torch.randn(case["outputs"]) if case["bias"] else None
    shape = (case["batch"], case["outputs"], *spec.output_size(case["h"], case["w"]))
    residual = residual_of(case["residual"], shape)
    counts = [
        t.shape[1] if listed is None else listed.numel()
        for t, listed in zip(tensors, index, strict=True)
    ]
    kernel = dk.PartialConv2d(weight, counts, spec, bias=bias, index=index, backend=backend)
    y = run(lambda out: kernel(tensors, residual, out), case["out"], shape, case, backend)
    oracle.check(y, oracle.conv2d(x, weight, spec, bias, residual), case)
    if case["out"] == "fresh":
        assert y.is_contiguous(memory_format=torch.channels_last), case


def run_gather(case: Case, backend: str, number: int) -> None:
    rng = seed(number)
    spec = spec_of(case["gh"], case["gw"], case["activation"])
    owned_out = ownership(case["owned_out"], case["outputs"], case["nodes"], rng)
    owned_in = ownership(case["owned_in"], case["inputs"], case["nodes"], rng)
    selected = selection(owned_in, case["density"], rng)
    mask = oracle.on_pattern(
        torch.empty(case["outputs"], case["inputs"]), owned_out, owned_in, selected
    )[:, :, None, None]
    weight = torch.randn(case["outputs"], case["inputs"], *spec.kernel_size)
    bias = torch.randn(case["outputs"]) if case["bias"] else None
    x = image(case["layout"], case["batch"], case["inputs"], case["h"], case["w"])
    shape = (case["batch"], case["outputs"], *spec.output_size(case["h"], case["w"]))
    residual = residual_of(case["residual"], shape)
    kernel = dk.GatherConv2d(
        torch.where(mask, weight, float("nan")),  # what lies outside the pattern is not read
        owned_out,
        owned_in,
        selected,
        spec,
        bias=bias,
        backend=backend,
    )
    y = run(lambda out: kernel(x, residual, out), case["out"], shape, case, backend)
    oracle.check(y, oracle.conv2d(x, torch.where(mask, weight, 0.0), spec, bias, residual), case)


@both_backends
def test_partial_conv2d(backend: str) -> None:
    cases = partial_cases()
    for number, case in enumerate(cases):
        run_partial(case, backend, number)
    assert covered_pairs(PARTIAL_AXES, cases) == possible_pairs(PARTIAL_AXES, fits)
    assert len(cases) > len(SEGMENT_LAYOUTS) * len(oracle.SOME_OUT_CHANNELS) - 1


@both_backends
def test_gather_conv2d(backend: str) -> None:
    cases = gather_cases()
    for number, case in enumerate(cases):
        run_gather(case, backend, number)
    assert covered_pairs(GATHER_AXES, cases) == possible_pairs(GATHER_AXES, fits)


@both_backends
def test_every_number_of_channels(backend: str) -> None:
    """All of 1..130 output and 0..40 input channels, the rest taken at random."""
    covered: dict[str, set[int]] = {name: set() for name in EVERY_CHANNEL}
    for number, case in enumerate(gather_cases()[:130]):
        case = case | {name: values[number % len(values)] for name, values in EVERY_CHANNEL.items()}
        run_gather(case, backend, number)
        case["layout"] = SEGMENT_LAYOUTS[number % len(SEGMENT_LAYOUTS)]
        run_partial(case, backend, number)
        for name, values in covered.items():
            values.add(case[name])
    assert {name: len(values) for name, values in covered.items()} == {"outputs": 130, "inputs": 41}


@pytest.mark.slow
@both_backends
def test_every_pair_of_channels(backend: str) -> None:
    """All values of every axis and all pairs of them, 130 x 41 channels included."""
    for axes, case_of in ((PARTIAL_AXES, run_partial), (GATHER_AXES, run_gather)):
        full = {**axes, **EVERY_CHANNEL}
        cases = pairwise(full, fits)
        for number, case in enumerate(cases):
            case_of(case, backend, number)
        assert covered_pairs(full, cases) == possible_pairs(full, fits)
        assert len(cases) >= 130 * 41


@both_backends
@pytest.mark.parametrize("inputs", [5, 1200])
def test_every_number_of_pixels(backend: str, inputs: int) -> None:
    """Each remainder of the register tiles; with 1,200 channels those of the input blocks too."""
    counts = range(1, 131) if inputs == 5 else (*range(50, 62), *range(108, 116), 169)
    covered = 0
    for pixels in counts:
        for outputs in (7, 33) if inputs == 5 else (33,):
            weight = torch.randn(outputs, inputs, 1, 1)
            x = image("w", 1, inputs, 1, pixels) if pixels % 2 else image("w", pixels, inputs, 1, 1)
            kernel = dk.PartialConv2d(weight, [inputs], dk.ConvSpec(), backend=backend)
            y = run(fresh(kernel, [x]), "fresh", (), pixels, backend)
            oracle.check(y, oracle.conv2d(x, weight, dk.ConvSpec()), (pixels, outputs))
            covered += 1
    assert covered == (260 if inputs == 5 else 21)


def two_passes(
    tensors: list[Tensor],
    index: list[Tensor | None],
    weight: Tensor,
    spec: dk.ConvSpec,
    bias: Tensor | None,
    residual: Tensor | None,
    backend: str,
    out: Tensor | None,
) -> Tensor:
    """The first segment alone, then the others added onto its result."""
    counts = [
        oracle.concatenated([t], [i], 1).shape[1] for t, i in zip(tensors, index, strict=True)
    ]
    geometry: Any = {
        "kernel_size": spec.kernel_size,
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
    }
    local = dk.prepack(weight[:, : counts[0]], counts[:1], backend=backend)
    remote = dk.prepack(weight[:, counts[0] :], counts[1:], backend=backend)
    y = dk.partial_conv2d(
        tensors[:1],
        index[:1],
        local,
        out_channels=weight.shape[0],
        bias=bias,
        backend=backend,
        **geometry,
    )
    y = y if out is None else out.copy_(y)
    dk.partial_conv2d_(
        y,
        tensors[1:],
        index[1:],
        remote,
        residual=residual,
        activation=spec.activation,
        backend=backend,
        **geometry,
    )
    return y


@both_backends
def test_two_passes_equal_one(backend: str) -> None:
    """What arrives late is added onto what was there: the oracle of the whole, and its bound."""
    cases = [c for c in partial_cases() if len(c["layout"]) > 1]
    for number, case in enumerate(cases):
        rng = seed(number)
        spec = spec_of(case["gh"], case["gw"], case["activation"])
        tensors, index = segments(
            case["layout"], case["inputs"], case["batch"], case["h"], case["w"], rng
        )
        x = oracle.concatenated(tensors, index, 1)
        weight = torch.randn(case["outputs"], x.shape[1], *spec.kernel_size)
        bias = torch.randn(case["outputs"]) if case["bias"] else None
        shape = (case["batch"], case["outputs"], *spec.output_size(case["h"], case["w"]))
        residual = residual_of(case["residual"], shape)
        call = partial(two_passes, tensors, index, weight, spec, bias, residual, backend)
        y = run(call, case["out"], shape, case, backend)
        oracle.check(y, oracle.conv2d(x, weight, spec, bias, residual), case)
    assert len(cases) > 250


TOKENS = ((), (1,), (7,), (2, 3), (0,), (2, 0, 3), (5, 1, 2), (33,))
LINEAR_AXES: dict[str, Sequence[object]] = {
    "outputs": oracle.SOME_OUT_CHANNELS,
    "inputs": oracle.SOME_IN_CHANNELS,
    "tokens": TOKENS,
    "memory": ("rows", "columns", "slice", "strided"),
    "segments": (1, 2, 4),
    "indexed": (False, True),
    "nodes": (1, 2, 3),
    "bias": (False, True),
    "residual": (False, True),
    "activation": dk.ACTIVATIONS,
}


def tokens_in(memory: str, tokens: tuple[int, ...], channels: int) -> Tensor:
    """``[*tokens, channels]``: contiguous, channels outermost, a slice, or every other channel."""
    if memory == "columns":
        return torch.randn(channels, *tokens).movedim(0, -1)
    if memory == "slice":
        return torch.randn(*tokens, channels + 4)[..., 2 : 2 + channels]
    if memory == "strided":
        return torch.randn(*tokens, 2 * channels)[..., ::2]
    return torch.randn(*tokens, channels)


@both_backends
def test_linear(backend: str) -> None:
    cases = pairwise(LINEAR_AXES)
    for number, case in enumerate(cases):
        rng = seed(number)
        cuts = sorted(rng.randint(0, case["inputs"]) for _ in range(case["segments"] - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, case["inputs"]], strict=True)]
        tensors, index = [], []
        for count in counts:
            owned = count + rng.randint(0, 5) if case["indexed"] else count
            tensors.append(tokens_in(case["memory"], case["tokens"], owned))
            listed = torch.tensor(rng.sample(range(owned), count), dtype=torch.int32)
            index.append(listed if case["indexed"] else None)
        x = oracle.concatenated(tensors, index, -1)
        weight = torch.randn(case["outputs"], case["inputs"])
        bias = torch.randn(case["outputs"]) if case["bias"] else None
        residual = None
        if case["residual"]:
            residual = tokens_in(case["memory"], case["tokens"], case["outputs"])
        kernel = dk.PartialLinear(
            weight,
            counts,
            bias=bias,
            index=index,
            activation=case["activation"],
            backend=backend,
        )
        y = run(fresh(kernel, tensors, residual), "fresh", (), case, backend)
        assert y.is_contiguous(), case
        oracle.check(y, oracle.linear(x, weight, bias, residual, case["activation"]), case)

        owned_out = ownership("uneven", case["outputs"], case["nodes"], rng)
        owned_in = ownership("shuffled", case["inputs"], case["nodes"], rng)
        selected = selection(owned_in, 0.4, rng)
        mask = oracle.on_pattern(weight, owned_out, owned_in, selected)
        gather = dk.GatherLinear(
            torch.where(mask, weight, float("nan")),
            owned_out,
            owned_in,
            selected,
            bias=bias,
            activation=case["activation"],
            backend=backend,
        )
        z = run(fresh(gather, x, residual), "fresh", (), case, backend)
        masked = torch.where(mask, weight, 0.0)
        oracle.check(z, oracle.linear(x, masked, bias, residual, case["activation"]), case)
    assert covered_pairs(LINEAR_AXES, cases) == possible_pairs(LINEAR_AXES)


@both_backends
def test_functional_operators_give_the_same_bits(backend: str) -> None:
    """The dispatcher's operators and the prepared kernels are one core."""
    spec = dk.ConvSpec((3, 2), (2, 1), (1, 0), (1, 2), "relu")
    x, payload = image("w", 2, 11, 9, 8), image("p", 2, 3, 9, 8)
    index = torch.tensor([4, 0, 10], dtype=torch.int32)
    weight, bias = torch.randn(19, 6, 3, 2), torch.randn(19)
    kernel = dk.PartialConv2d(weight, [3, 3], spec, bias=bias, index=[index, None], backend=backend)
    y = dk.partial_conv2d(
        [x, payload],
        [index.long(), None],
        dk.prepack(weight, [3, 3], backend=backend),
        out_channels=19,
        kernel_size=(3, 2),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 2),
        bias=bias,
        activation="relu",
        backend=backend,
    )
    assert torch.equal(y, kernel([x, payload]))

    owned_out = dk.Ownership(((3, 1), (0, 2, 4)))
    owned_in = dk.Ownership.contiguous(11, 2)
    selected = (((), (7, 9)), ((0,), ()))
    dense, dense_bias = torch.randn(5, 11, 3, 2), torch.randn(5)
    gather = dk.GatherConv2d(
        dense, owned_out, owned_in, selected, spec, bias=dense_bias, backend=backend
    )
    reads = [[*range(6), 7, 9], [*range(6, 11), 0]]
    packed = torch.cat(
        [
            dk.prepack(dense[list(o)][:, r], [len(r)], backend=backend)
            for o, r in zip(owned_out.channels, reads, strict=True)
        ]
    )
    z = dk.gather_conv2d(
        x,
        torch.tensor(reads[0] + reads[1], dtype=torch.int32),
        [8, 6],
        [2, 3],
        packed,
        kernel_size=(3, 2),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 2),
        out_index=torch.tensor([3, 1, 0, 2, 4], dtype=torch.int32),
        bias=dense_bias,
        activation="relu",
        backend=backend,
    )
    assert torch.equal(z, gather(x))


@both_backends
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_and_infinity_propagate_as_in_torch(backend: str, activation: str) -> None:
    spec = dk.ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), activation)
    covered = 0
    for outputs in (1, 7, 16, 33, 64):
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = image("w", 2, 6, 13, 11)
            x[0, 2, 4, 5] = bad
            x[1, 5, 0, 0] = bad
            weight, bias = torch.randn(outputs, 6, 3, 3), torch.randn(outputs)
            residual = image("w", 2, outputs, 13, 11)
            residual[0, outputs - 1, 12, 10] = bad
            kernel = dk.PartialConv2d(weight, [6], spec, bias=bias, backend=backend)
            y = run(fresh(kernel, [x], residual), "fresh", (), bad, backend)
            oracle.check(y, oracle.conv2d(x, weight, spec, bias, residual), (outputs, bad))
            wanted = F.conv2d(x, weight, bias, padding=1) + residual
            wanted = wanted.relu() if activation == "relu" else wanted
            assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
            assert bad != bad or bool(y.isinf().any()) or activation == "relu"
            covered += 1
    assert covered == 15


@both_backends
def test_numbers_at_the_ends_of_the_range(backend: str) -> None:
    """Denormal weights (which may count as zero) and inputs, huge and tiny values, signed zeros."""
    covered = 0
    for scale_w, scale_x in ((1e-39, 1.0), (1e-39, 1e37), (1e-30, 1e-12), (1e15, 1e15), (0.0, 1.0)):
        weight = torch.randn(21, 10, 3, 3) * scale_w
        weight[::2] = torch.randn(11, 10, 3, 3) * 1e-3
        x = image("w", 2, 10, 6, 7) * scale_x
        spec = dk.ConvSpec((3, 3), padding=(1, 1))
        kernel = dk.PartialConv2d(weight, [10], spec, backend=backend)
        y = run(fresh(kernel, [x]), "fresh", (), (scale_w, scale_x), backend)
        oracle.check(y, oracle.conv2d(x, weight, spec), (scale_w, scale_x))
        covered += 1
    assert covered == 5


@needs_extension
def test_threads_do_not_show_where_zero_matters_cpu() -> None:
    """Left-out taps of a border show as 0 * infinity and -0 + 0: the same for any thread count."""
    axes: dict[str, Sequence[object]] = {
        "gh": oracle.GEOMETRIES,
        "h": oracle.ALL_MAPS,
        "gw": oracle.GEOMETRIES,
        "w": oracle.ALL_MAPS,
    }
    cases = pairwise(axes, fits)
    for number, case in enumerate(cases):
        seed(number)
        spec = spec_of(case["gh"], case["gw"], "none")
        weight = torch.randn(33, 3, *spec.kernel_size)
        weight[5, 1, 0, 0], weight[7, 1, -1, -1], weight[9] = float("inf"), float("nan"), 0.0
        bias = torch.full((33,), -0.0)
        kernel = dk.PartialConv2d(weight, [3], spec, bias=bias, backend="cpu")
        run(fresh(kernel, [image("w", 3, 3, case["h"], case["w"])]), "fresh", (), case, "cpu")
    assert covered_pairs(axes, cases) == possible_pairs(axes, fits)


@needs_extension
def test_denormal_weights_are_packed_as_zero_cpu() -> None:
    """They would cost some 40 times a normal multiplication."""
    weight = torch.full((3, 2, 1, 1), 1e-39)
    kernel = dk.PartialConv2d(weight, [2], dk.ConvSpec(), backend="cpu")
    assert torch.count_nonzero(kernel([torch.full((1, 2, 1, 1), 1e38)])) == 0


@both_backends
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_index_lists(backend: str, data: st.DataObject) -> None:
    """Any channels, in any order, any number of times, from any number of segments."""
    owned = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="channels owned")
    lists = [data.draw(st.lists(st.integers(0, n - 1), max_size=12)) for n in owned]
    outputs = data.draw(st.integers(1, 40), label="outputs")
    tensors = [image("w", 1, n, 3, 5) for n in owned]
    index: list[Tensor | None] = [torch.tensor(listed, dtype=torch.int32) for listed in lists]
    weight = torch.randn(outputs, sum(map(len, lists)), 2, 2)
    spec = dk.ConvSpec((2, 2))
    kernel = dk.PartialConv2d(weight, [len(i) for i in lists], spec, index=index, backend=backend)
    x = oracle.concatenated(tensors, index, 1)
    oracle.check(kernel(tensors), oracle.conv2d(x, weight, spec), lists)


@both_backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ownership_and_selection(backend: str, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 4), label="nodes")
    outputs, inputs = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 12))
    rank_of_out = [data.draw(st.integers(0, nodes - 1)) for _ in range(outputs)]
    rank_of_in = [data.draw(st.integers(0, nodes - 1)) for _ in range(inputs)]

    def owned(rank_of: list[int]) -> dk.Ownership:
        order = data.draw(st.permutations(range(len(rank_of))))
        return dk.Ownership(
            tuple(tuple(c for c in order if rank_of[c] == rank) for rank in range(nodes))
        )

    owned_out, owned_in = owned(rank_of_out), owned(rank_of_in)
    weight = torch.randn(outputs, inputs, 1, 1)
    weight[torch.rand(outputs, inputs) < 0.7] = 0.0
    x = image("w", 1, inputs, 3, 3)
    # Whatever is zero in the weights, what find_selected reads off them makes the layer exact.
    selected = dk.find_selected(weight, owned_out, owned_in)
    kernel = dk.GatherConv2d(weight, owned_out, owned_in, selected, dk.ConvSpec(), backend=backend)
    oracle.check(kernel(x), oracle.conv2d(x, weight, dk.ConvSpec()), (owned_out, owned_in))


@both_backends
def test_lazily_negated_views(backend: str) -> None:
    """``z.conj().imag`` is float32 memory whose sign torch has not yet changed."""
    x = torch.randn(2, 5, 4, 4, dtype=torch.complex64).conj().imag
    weight = torch._neg_view(torch.randn(6, 5, 1, 1))
    bias, residual = torch._neg_view(torch.randn(6)), torch._neg_view(torch.randn(2, 6, 4, 4))
    assert x.is_neg() and weight.is_neg() and bias.is_neg() and residual.is_neg()
    kernel = dk.PartialConv2d(weight, [5], dk.ConvSpec(), bias=bias, backend=backend)
    oracle.check(kernel([x], residual), oracle.conv2d(x, weight, dk.ConvSpec(), bias, residual))
    with pytest.raises(ValueError, match="lazy negation"):
        kernel([x], out=torch._neg_view(image("w", 2, 6, 4, 4)))


@both_backends
def test_default_dtype_and_device_do_not_matter(backend: str) -> None:
    weight, x = torch.randn(6, 5, 1, 1), image("w", 1, 5, 3, 3)
    expected = oracle.conv2d(x, weight, dk.ConvSpec())
    owned = dk.Ownership.contiguous(6, 2), dk.Ownership(((0, 2, 4), (1, 3)))
    selected = dk.find_selected(weight, *owned)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            kernel = dk.GatherConv2d(weight, *owned, selected, dk.ConvSpec(), backend=backend)
            y = kernel(x)
    finally:
        torch.set_default_dtype(torch.float32)
    oracle.check(y, expected)


@needs_extension
def test_the_instruction_set_asked_for_runs_cpu() -> None:
    assert STATUS.isa in STATUS.available_isas
    assert STATUS.isa == (os.environ.get("DISCO_KERNELS_ISA") or STATUS.available_isas[-1])


@needs_extension
def test_many_threads_calling_one_kernel_cpu() -> None:
    """A prepared kernel holds no state of a call."""
    weight = torch.randn(40, 12, 3, 3)
    kernel = dk.PartialConv2d(weight, [12], dk.ConvSpec((3, 3), padding=(1, 1)), backend="cpu")
    inputs = [image("w", 1, 12, 5 + i % 7, 9) for i in range(48)]
    wanted = [kernel([x]) for x in inputs]
    with threads(2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: kernel([x]), inputs))
    assert sum(torch.equal(bits(a), bits(b)) for a, b in zip(wanted, found, strict=True)) == 48


@needs_extension
def test_nothing_outside_of_the_buffers_is_touched_cpu() -> None:
    """Every user buffer against pages that may not be touched, in a process of its own."""
    done = python("-m", "tests.kernels.guard", environment={"DISCO_KERNELS_ISA": STATUS.isa or ""})
    assert done.returncode == 0, f"exit status {done.returncode} (-11: touched)\n{done.stderr}"
    assert done.stdout.split() == ["guarded", "2082"]


def test_the_oracle_would_notice() -> None:
    """A bound that accepts anything proves nothing: small mistakes must fail."""
    x, weight = image("w", 1, 8, 5, 5), torch.randn(4, 8, 3, 3)
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    expected = oracle.conv2d(x, weight, spec)
    right = F.conv2d(x, weight, padding=1)
    oracle.check(right, expected)
    nudged, swapped_channels, missing = right.clone(), right[:, [1, 0, 2, 3]], right.clone()
    nudged[0, 1, 2, 3] += 1e-3
    missing[0, 0, 0, 0] = float("nan")
    for wrong in (nudged, swapped_channels, missing, right[:, :3]):
        with pytest.raises(AssertionError):
            oracle.check(wrong, expected)
