"""The ops that `disco_kernels` runs: weights are packed once; no call goes through dispatch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import disco_kernels as dk
from disco.errors import InputError
from disco.executor.request import Request
from disco.executor.steps import REQUEST_SLOT, Preparation, Run, Step, Values, prepare_pure
from disco.executor.two_passes import LocalPart, local_part
from disco.program import Op, Ref


def prepare_conv2d(op: Op, prepare: Preparation) -> Step:
    """A whole convolution: the kernel over one segment; with groups, the grouped kernel."""
    x, weight, bias, residual = op.args
    if op.kwargs["groups"] != 1:
        return _prepare_grouped(op, prepare)
    kernel = prepare.weight(weight, op)
    convolution = dk.PartialConv2d(
        kernel,
        (kernel.shape[1],),
        _spec(op, kernel, prepare),
        bias=prepare.optional_weight(bias, op),
        image_size=prepare.image_size(x),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_segments(op, prepare, convolution, (x,), residual)


def prepare_linear(op: Op, prepare: Preparation) -> Step:
    """A whole linear: the kernel over one segment."""
    x, weight, bias, residual = op.args
    matrix = prepare.weight(weight, op)
    kernel = dk.PartialLinear(
        matrix,
        (matrix.shape[1],),
        bias=prepare.optional_weight(bias, op),
        activation=_text(op, "activation"),
        input_bytes=prepare.input_bytes.get(op.name),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_segments(op, prepare, kernel, (x,), residual)


def prepare_partial_conv2d(op: Op, prepare: Preparation) -> Step:
    """One rank's convolution over its own channels and the payloads it has received."""
    segments, weight, bias, residual = op.args
    kernel = prepare.weight(weight, op)
    index, counts, held = _segments(op, prepare)
    first = segments[0] if isinstance(segments, tuple) else None
    convolution = dk.PartialConv2d(
        kernel,
        counts,
        _spec(op, kernel, prepare),
        bias=prepare.optional_weight(bias, op),
        index=index,
        source_channels=held,
        image_size=prepare.image_size(first),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_segments(op, prepare, convolution, segments, residual)


def prepare_partial_linear(op: Op, prepare: Preparation) -> Step:
    """One rank's linear over its own channels and the payloads it has received."""
    segments, weight, bias, residual = op.args
    index, counts, _ = _segments(op, prepare)
    kernel = dk.PartialLinear(
        prepare.weight(weight, op),
        counts,
        bias=prepare.optional_weight(bias, op),
        index=index,
        activation=_text(op, "activation"),
        input_bytes=prepare.input_bytes.get(op.name),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_segments(op, prepare, kernel, segments, residual)


def prepare_gather_conv2d(op: Op, prepare: Preparation) -> Step:
    """All nodes of a convolution here, each reading its own and its selected channels."""
    x, weight, bias, residual = op.args
    kernel = prepare.weight(weight, op)
    convolution = dk.GatherConv2d(
        kernel,
        *_pattern(op),
        _spec(op, kernel, prepare),
        bias=prepare.optional_weight(bias, op),
        image_size=prepare.image_size(x),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_input(op, prepare, convolution, x, residual)


def prepare_gather_linear(op: Op, prepare: Preparation) -> Step:
    """All nodes of a linear on this machine."""
    x, weight, bias, residual = op.args
    kernel = dk.GatherLinear(
        prepare.weight(weight, op),
        *_pattern(op),
        bias=prepare.optional_weight(bias, op),
        activation=_text(op, "activation"),
        input_bytes=prepare.input_bytes.get(op.name),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_input(op, prepare, kernel, x, residual)


def prepare_max_pool2d(op: Op, prepare: Preparation) -> Step:
    """Max pooling without leaving channels-last; what the kernel does not do, torch does."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = {**dict(zip(names, op.args[1:], strict=False)), **op.kwargs}
    plain = prepare_pure(op, prepare)
    if given.get("ceil_mode", False) or not _may_be_pooled(op.args[0], prepare):
        return plain
    kernel_size: Any = given["kernel_size"]
    stride: Any = given.get("stride") or kernel_size
    padding: Any = given.get("padding", 0)
    dilation: Any = given.get("dilation", 1)
    window = dk.ConvSpec(_both(kernel_size), _both(stride), _both(padding), _both(dilation))
    pool = dk.MaxPool2d(window, prepare.backend)
    slot, target = prepare.slot_of(op.args[0], op), prepare.slot(op.name)

    def run(values: Values) -> Tensor:
        x, out = values[slot], values[REQUEST_SLOT].activations.out.get(target)
        return pool(x, out) if _is_pooled(x) else _into(plain.run(values), out)

    return Step(op.name, run, target, writes_out=True)


def prepare_global_avg_pool2d(op: Op, prepare: Preparation) -> Step:
    """Means over whole maps: `adaptive_avg_pool2d` to one pixel, `mean` over height and width."""
    x, wanted, *rest = op.args
    keeps = bool(rest[0]) if rest else bool(op.kwargs.get("keepdim", False))
    if op.kind == "aten.mean.dim":
        dims = wanted if isinstance(wanted, tuple) else (wanted,)
        whole = keeps and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}
    else:
        whole = wanted in (1, (1,), (1, 1))
    plain = prepare_pure(op, prepare)
    if not (whole and _may_be_pooled(x, prepare)) or op.kwargs.get("dtype") is not None:
        return plain
    pool = dk.GlobalAvgPool2d(prepare.backend)
    slot, target = prepare.slot_of(x, op), prepare.slot(op.name)

    def run(values: Values) -> Tensor:
        kept = values[REQUEST_SLOT].activations
        bound = kept.bound.get(target)
        if bound is not None:
            bound()
            return kept.out[target]
        x, out = values[slot], kept.out.get(target)
        if not _is_pooled(x):
            return _into(plain.run(values), out)
        if out is not None and kept.holds((slot,), tokens=False):
            kept.bound[target] = pool.bind(x, out)
            return out
        return pool(x, out)

    return Step(op.name, run, target, writes_out=True)


_POOLED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _may_be_pooled(x: Any, prepare: Preparation) -> bool:
    """Whether the kernels may turn out to serve a value: a rank's program says of few values what
    they are."""
    info = prepare.values.get(x.name) if isinstance(x, Ref) else None
    return info is None or (len(info.shape) == 4 and info.dtype in _POOLED)


def _is_pooled(x: Tensor) -> bool:
    return x.dim() == 4 and x.dtype in _POOLED.values() and x.shape[2] * x.shape[3] > 0


def _into(result: Tensor, out: Tensor | None) -> Tensor:
    """Where a value has its place, kernels may be bound to it."""
    return result if out is None else out.copy_(result)


def _both(value: Any) -> tuple[int, int]:
    """torch's sizes: one number, or one or two in a tuple."""
    pair = value if isinstance(value, tuple) else (value,)
    return (pair[0], pair[-1])


def _prepare_grouped(op: Op, prepare: Preparation) -> Step:
    """Groups read nothing of each other: the same kernel for all of them and for a rank's own."""
    x, weight, bias, residual = op.args
    kernel, groups = prepare.weight(weight, op), op.kwargs["groups"]
    if not isinstance(groups, int):
        raise InputError(f"op {op.name!r} ({op.kind}): groups must be a number, given {groups!r}")
    convolution = dk.GroupedConv2d(
        kernel,
        groups,
        _spec(op, kernel, prepare),
        bias=prepare.optional_weight(bias, op),
        image_size=prepare.image_size(x),
        backend=prepare.backend,
        packing=prepare.packing,
    )
    return _over_input(op, prepare, convolution, x, residual)


def _over_segments(op: Op, prepare: Preparation, kernel: Any, segments: Any, residual: Any) -> Step:
    slots = tuple(prepare.slot_of(segment, op) for segment in segments)
    added, target = prepare.optional_slot(residual, op), prepare.slot(op.name)
    fixed = slots if added is None else (*slots, added)
    scaled = _scale_slots(op, prepare)
    tokens = isinstance(kernel, dk.PartialLinear)
    local = local_part(kernel, slots, prepare.payloads)

    def run(values: Values) -> Tensor:
        request: Request = values[REQUEST_SLOT]
        kept = request.activations
        bound = kept.bound.get(target)
        if bound is not None:
            bound()
            return kept.out[target]
        passes = kept.passes.get(target)
        if passes is not None:
            if target in request.begun:
                request.begun.remove(target)
                passes.second()
            else:
                passes.whole()
            return kept.out[target]
        given = [values[slot] for slot in slots]
        scale = scaled and [None if slot is None else values[slot] for slot in scaled]
        residual, out = None if added is None else values[added], kept.out.get(target)
        if out is not None and kept.holds(fixed, tokens=tokens):
            if local is not None and local.in_two_passes:
                kept.passes[target] = kernel.bind_passes(
                    given, residual, out, local.num_first, scale=scale
                )
            else:
                kept.bound[target] = kernel.bind(given, residual, out, scale=scale)
            return out
        return kernel(given, residual, out, scale)

    return _kernel_step(op, prepare, run, kernel, local)


def _scale_slots(op: Op, prepare: Preparation) -> list[int | None] | None:
    """Per segment the slot of its scales, for int8 payloads; None if there is none among them."""
    scale = op.kwargs.get("scale")
    if scale is None:
        return None
    segments = op.args[0]
    if not (isinstance(scale, tuple) and isinstance(segments, tuple)) or len(scale) != len(
        segments
    ):
        raise InputError(f"op {op.name!r} ({op.kind}) needs a scale, or None, for every segment")
    return [prepare.optional_slot(item, op) for item in scale]


def _over_input(op: Op, prepare: Preparation, kernel: Any, x: Any, residual: Any) -> Step:
    slot, added = prepare.slot_of(x, op), prepare.optional_slot(residual, op)
    target = prepare.slot(op.name)
    fixed = (slot,) if added is None else (slot, added)
    tokens = isinstance(kernel, dk.GatherLinear)

    def run(values: Values) -> Tensor:
        kept = values[REQUEST_SLOT].activations
        bound = kept.bound.get(target)
        if bound is not None:
            bound()
            return kept.out[target]
        residual, out = None if added is None else values[added], kept.out.get(target)
        if out is not None and kept.holds(fixed, tokens=tokens):
            kept.bound[target] = kernel.bind(values[slot], residual, out)
            return out
        return kernel(values[slot], residual, out)

    return _kernel_step(op, prepare, run, kernel)


def _kernel_step(
    op: Op, prepare: Preparation, run: Run, kernel: Any, local: LocalPart | None = None
) -> Step:
    out = prepare.slot(op.name)
    prepare.kernels[op.name] = kernel
    return Step(op.name, run, out, progress=True, writes_out=True, local=local)


def _segments(op: Op, prepare: Preparation) -> tuple[list[Tensor | None], list[int], list[int]]:
    """Per segment: the channels to read (None for all), how many those are, how many it holds."""
    held, listed = op.kwargs["channels"], op.kwargs["index"]
    segments = op.args[0]
    if not (isinstance(held, tuple) and isinstance(listed, tuple) and isinstance(segments, tuple)):
        raise InputError(f"op {op.name!r} ({op.kind}) needs tuples of segments, channels and index")
    if not len(held) == len(listed) == len(segments):
        raise InputError(
            f"op {op.name!r} ({op.kind}) has {len(segments)} segments, but {len(listed)} indices"
        )
    index = [prepare.optional_kept_weight(item, op) for item in listed]
    channels = [int(count) for count in held if isinstance(count, int)]
    counts = [n if i is None else i.numel() for n, i in zip(channels, index, strict=True)]
    return index, counts, channels


def _pattern(op: Op) -> tuple[dk.Ownership, dk.Ownership, Any]:
    out, inputs, selected = (op.kwargs[k] for k in ("out_ownership", "in_ownership", "selected"))
    return dk.Ownership(out), dk.Ownership(inputs), selected  # type: ignore[arg-type]


def _spec(op: Op, weight: Tensor, prepare: Preparation) -> dk.ConvSpec:
    pairs = {key: _pair(op, key) for key in ("stride", "padding", "dilation")}
    height, width = weight.shape[2:]
    spec = dk.ConvSpec(
        (height, width),
        pairs["stride"],
        pairs["padding"],
        pairs["dilation"],
        _text(op, "activation"),
    )
    given = prepare.input_bytes.get(op.name)
    if given is not None:
        return replace(spec, input_bytes=given)
    return replace(spec, winograd=prepare.winograd) if spec.winograd_fits else spec


def _pair(op: Op, key: str) -> tuple[int, int]:
    value = op.kwargs[key]
    if isinstance(value, tuple) and len(value) == 2:
        first, second = value
        if isinstance(first, int) and isinstance(second, int):
            return first, second
    raise InputError(f"op {op.name!r} ({op.kind}): {key} must be two numbers, given {value!r}")


def _text(op: Op, key: str) -> str:
    value = op.kwargs[key]
    if not isinstance(value, str):
        raise InputError(f"op {op.name!r} ({op.kind}): {key} must be a string, given {value!r}")
    return value
