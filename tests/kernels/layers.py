"""One case of a covering array as a layer: built, run on 1, 2 and 3 threads, and compared.

A case names (axes of the tests): outputs, inputs, layout, h, w, batch, bias, residual, activation,
out; for a gather layer also nodes, density, owned_out and owned_in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.core import as_sources, channels_last, execute
from tests.kernels import oracle
from tests.kernels.cases import (
    OWNERSHIPS,
    SEGMENT_LAYOUTS,
    image,
    in_dtype,
    output_of,
    ownership,
    residual_of,
    run,
    seed,
    segments,
    selection,
)
from tests.kernels.covering import Case

EPILOGUES: dict[str, Sequence[object]] = {
    "bias": (False, True),
    "residual": ("none", "nhwc", "nchw", "slice"),
    "activation": dk.ACTIVATIONS,
    "out": ("fresh", "dense", "slice", "crop"),
}


# Of a layer in any dtype but float32, whose tests have more values an axis.
AXES: dict[str, Sequence[object]] = {
    "outputs": oracle.SOME_OUT_CHANNELS,
    "inputs": oracle.SOME_IN_CHANNELS,
    "gh": oracle.GEOMETRIES,
    "h": oracle.ALL_MAPS,
    "gw": oracle.GEOMETRIES,
    "w": oracle.ALL_MAPS,
    "batch": (0, 1, 3),
    **EPILOGUES,
}
PARTIAL_AXES: dict[str, Sequence[object]] = {**AXES, "layout": SEGMENT_LAYOUTS}
GATHER_AXES: dict[str, Sequence[object]] = {
    **AXES,
    "layout": ("w", "c", "v", "h", "x"),
    "nodes": (1, 2, 3, 4),
    "density": (0.0, 0.3, 1.0),
    "owned_out": OWNERSHIPS,
    "owned_in": OWNERSHIPS,
}


def run_partial(case: Case, spec: dk.ConvSpec, dtype: torch.dtype, number: int) -> None:
    """`PartialConv2d` of a case; on the C++ kernels."""
    rng = seed(number)
    batch, h, w = case["batch"], case["h"], case["w"]
    tensors, index = segments(case["layout"], case["inputs"], batch, h, w, rng)
    tensors = [in_dtype(t, dtype) for t in tensors]
    x = oracle.concatenated(tensors, index, 1)
    weight = torch.randn(case["outputs"], x.shape[1], *spec.kernel_size).to(dtype)
    bias = torch.randn(case["outputs"]).to(dtype) if case["bias"] else None
    shape = (batch, case["outputs"], *spec.output_size(h, w))
    residual = _residual(case, shape, dtype)
    counts = [
        t.shape[1] if listed is None else listed.numel()
        for t, listed in zip(tensors, index, strict=True)
    ]
    kernel = dk.PartialConv2d(weight, counts, spec, bias=bias, index=index, backend="cpu")
    y = run(lambda out: kernel(tensors, residual, out), case["out"], shape, case, "cpu", dtype)
    expected = oracle.conv2d(x, weight, spec, bias, residual)
    oracle.check(y, oracle.rounded(expected, dtype), case)
    assert y.dtype == dtype


def run_gather(case: Case, spec: dk.ConvSpec, dtype: torch.dtype, number: int) -> None:
    """`GatherConv2d` of a case, and the same added onto what an output holds."""
    rng = seed(number)
    owned_out = ownership(case["owned_out"], case["outputs"], case["nodes"], rng)
    owned_in = ownership(case["owned_in"], case["inputs"], case["nodes"], rng)
    selected = selection(owned_in, case["density"], rng)
    weight = torch.randn(case["outputs"], case["inputs"], *spec.kernel_size).to(dtype)
    mask = oracle.on_pattern(weight, owned_out, owned_in, selected)[:, :, None, None]
    bias = torch.randn(case["outputs"]).to(dtype) if case["bias"] else None
    x = in_dtype(image(case["layout"], case["batch"], case["inputs"], case["h"], case["w"]), dtype)
    shape = (case["batch"], case["outputs"], *spec.output_size(case["h"], case["w"]))
    residual = _residual(case, shape, dtype)
    given = torch.where(mask, weight, float("nan"))  # what lies outside the pattern is not read
    kernel = dk.GatherConv2d(given, owned_out, owned_in, selected, spec, bias=bias, backend="cpu")
    y = run(lambda out: kernel(x, residual, out), case["out"], shape, case, "cpu", dtype)
    read = torch.where(mask, weight, 0.0)
    expected = oracle.conv2d(x, read, spec, bias, residual)
    oracle.check(y, oracle.rounded(expected, dtype), case)

    target = output_of("slice" if case["out"] == "fresh" else case["out"], shape, dtype)
    assert target.target is not None
    before = torch.randn(shape).to(dtype)
    target.target.copy_(before)
    execute(
        kernel._prepared,
        kernel.descriptor,
        as_sources([x], x.dtype),
        kernel.packed_weight,
        kernel.bias,  # of the first pass: not added again
        residual,
        target.target,
        accumulate=True,
    )
    expected = oracle.conv2d(x, read, spec, None, residual, before)
    oracle.check(target.target, oracle.rounded(expected, dtype), (case, "accumulate"))
    target.check_margins(case)


def _residual(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    residual = residual_of(case["residual"], shape)
    return None if residual is None else in_dtype(channels_last(residual, "residual"), dtype)
