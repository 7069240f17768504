"""The operators torch's dispatcher knows, under ``torch.ops.disco_kernels``: schemas, fakes and the
one implementation of each, which hands over to the backend named in the call.

Layout of a ``packed_weight`` belongs to its backend, so a fake kernel cannot read shapes off it:
they come as arguments. Channel numbers are checked by the
backends, while they read them. `disco_kernels.functional` is the documented face of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import (
    as_sources,
    channels_last,
    empty_output,
    execute,
    image_as_tokens,
    index_tensor,
    refuse_derivatives,
    tokens_as_image,
)
from disco_kernels.spec import (
    WINOGRAD,
    Channels,
    Conv2dDescriptor,
    ConvSpec,
    GroupedDescriptor,
    Node,
    Pair,
    Segment,
    grouped_descriptor,
)
from disco_kernels.wire import check_wire_dtype, message_numel

NAMESPACE = "disco_kernels"
_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_WINOGRAD = 'str winograd="off"'
_SCALE = "Tensor?[]? scale=None"

SCHEMAS = (
    f"prepack(Tensor weight, int[] segment_channels, str backend, {_WINOGRAD}) -> Tensor",
    "partial_conv2d(Tensor[] segments, Tensor?[] index, Tensor packed_weight, Tensor? bias, "
    f"Tensor? residual, int out_channels, {_GEOMETRY}, str activation, str backend, "
    f"{_WINOGRAD}, {_SCALE}) -> Tensor",
    "partial_conv2d_(Tensor(a!) out, Tensor[] segments, Tensor?[] index, Tensor packed_weight, "
    f"Tensor? residual, {_GEOMETRY}, str activation, str backend, {_WINOGRAD}, {_SCALE}) -> ()",
    "partial_linear(Tensor[] segments, Tensor?[] index, Tensor packed_weight, Tensor? bias, "
    f"Tensor? residual, int out_features, str activation, str backend, {_SCALE}) -> Tensor",
    "gather_conv2d(Tensor x, Tensor channel_index, int[] in_splits, int[] out_splits, "
    "Tensor? out_index, Tensor packed_weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}, str activation, str backend, {_WINOGRAD}) -> Tensor",
    "gather_linear(Tensor x, Tensor channel_index, int[] in_splits, int[] out_splits, "
    "Tensor? out_index, Tensor packed_weight, Tensor? bias, Tensor? residual, "
    "str activation, str backend) -> Tensor",
    "prepack_grouped(Tensor weight, int groups, str backend) -> Tensor",
    "grouped_conv2d(Tensor x, Tensor packed_weight, Tensor? bias, Tensor? residual, "
    f"int out_channels, int groups, {_GEOMETRY}, str activation, str backend) -> Tensor",
    "gather_pack_(Tensor x, Tensor channel_index, int[] splits, Tensor(a!) out, str backend) -> ()",
)

# The object must live as long as the operators are used.
_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


def _as_pair(values: Sequence[int]) -> Pair:
    return (int(values[0]), int(values[1]))


def _conv_spec(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    winograd: str,
) -> ConvSpec:
    return ConvSpec(
        _as_pair(kernel_size),
        _as_pair(stride),
        _as_pair(padding),
        _as_pair(dilation),
        activation,
        _resolved(winograd),
    )


def _resolved(winograd: str) -> str:
    """A packed weight and the calls that read it have to name one algorithm: no choice here."""
    if winograd == "auto":
        raise ValueError(
            "winograd 'auto' cannot be resolved here, because a packed weight has to fit the call: "
            "resolve it with disco_kernels.choose_winograd first, and give prepack and the call "
            "its answer"
        )
    if winograd not in WINOGRAD:
        raise ValueError(f"winograd must be one of off, f2, f4, given {winograd!r}")
    return winograd


def _refuse_derivatives(op: str, *tensors: Tensor | None) -> None:
    refuse_derivatives(f"{NAMESPACE}::{op}", *tensors)


def _flat_index(index: Tensor, name: str) -> Tensor:
    """The kernels read a contiguous int32 index in CPU memory; the values are checked by them."""
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 (or int64), given {index.dtype}")
    if index.dtype == torch.int64:
        index = index_tensor(index, 2**31 - 1, name)
    return index.to("cpu", torch.int32).contiguous()


def _check_splits(name: str, splits: Sequence[int], index: Tensor) -> None:
    if min(splits, default=0) < 0 or sum(splits) != index.numel():
        raise ValueError(
            f"{name} {list(splits)} must be counts that sum to the {index.numel()} listed channels"
        )


def _backend(name: str, like: Tensor) -> registry.Backend:
    """The backend called ``name``, if it serves tensors such as ``like``."""
    return registry.get(registry.resolve(name, like.device, like.dtype))


def _prepack(
    weight: Tensor, segment_channels: Sequence[int], backend: str, winograd: str = "off"
) -> Tensor:
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    counts_fit = min(segment_channels, default=0) >= 0
    if weight.dim() != 4 or sum(segment_channels) != weight.shape[1] or not counts_fit:
        raise ValueError(
            f"weight must be [O, K, kh, kw] (or [O, K]) with K the sum of the counts in "
            f"segment_channels {list(segment_channels)}, given {list(weight.shape)}"
        )
    if _resolved(winograd) != "off" and tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(
            f"winograd {winograd!r} is for kernels of 3 x 3, given a weight {list(weight.shape)}"
        )
    return _backend(backend, weight).prepack(weight, segment_channels, winograd)


def _prepack_fake(
    weight: Tensor, segment_channels: Sequence[int], backend: str, winograd: str = "off"
) -> Tensor:
    taps = weight.shape[2] * weight.shape[3] if weight.dim() == 4 else 1
    numel = registry.get(backend).packed_numel(
        weight.shape[0], segment_channels, taps, weight.dtype, winograd
    )
    return weight.new_empty((numel,))


def _partial_descriptor(
    sources: Sequence[Tensor],
    index: Sequence[Tensor | None],
    out_channels: int,
    spec: ConvSpec,
) -> Conv2dDescriptor:
    if not sources or len(sources) != len(index):
        raise ValueError(
            f"give at least one segment, and for each an index or None; given {len(sources)} "
            f"segments and {len(index)} indices"
        )
    segments = []
    for s, (x, listed) in enumerate(zip(sources, index, strict=True)):
        channels = Channels(x.shape[1])
        if listed is not None:
            flat = _flat_index(listed, f"index[{s}]")
            channels = Channels(flat.numel(), 0, flat)
        segments.append(Segment(s, channels))
    return Conv2dDescriptor(spec, (Node(tuple(segments), Channels(out_channels)),))


def _partial_conv2d(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
    winograd: str = "off",
    scale: Sequence[Tensor | None] | None = None,
) -> Tensor:
    _refuse_derivatives("partial_conv2d", *segments, packed_weight, bias, residual, *(scale or ()))
    sources = as_sources(segments, packed_weight.dtype)
    spec = _conv_spec(kernel_size, stride, padding, dilation, activation, winograd)
    descriptor = _partial_descriptor(sources, index, out_channels, spec)
    prepared = _backend(backend, packed_weight).prepare(descriptor, packed_weight.dtype)
    return execute(
        prepared, descriptor, sources, packed_weight, bias, residual, narrow=True, scales=scale
    )


def _partial_conv2d_fake(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
    winograd: str = "off",
    scale: Sequence[Tensor | None] | None = None,
) -> Tensor:
    x = segments[0]
    size = _fake_size(x, kernel_size, stride, padding, dilation)
    return empty_output(x, out_channels, *size, dtype=packed_weight.dtype)


def _fake_size(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    # No comparisons: they would turn symbolic sizes into fixed ones.
    height, width = (
        (x.shape[2 + a] + 2 * padding[a] - dilation[a] * (kernel_size[a] - 1) - 1) // stride[a] + 1
        for a in range(2)
    )
    return height, width


def _partial_conv2d_accumulate(
    out: Tensor,
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
    winograd: str = "off",
    scale: Sequence[Tensor | None] | None = None,
) -> None:
    _refuse_derivatives("partial_conv2d_", out, *segments, packed_weight, residual, *(scale or ()))
    sources = as_sources(segments, packed_weight.dtype)
    spec = _conv_spec(kernel_size, stride, padding, dilation, activation, winograd)
    if out.dim() != 4:
        raise ValueError(f"out must be [B, O, OH, OW], given {list(out.shape)}")
    descriptor = _partial_descriptor(sources, index, out.shape[1], spec)
    prepared = _backend(backend, packed_weight).prepare(descriptor, packed_weight.dtype)
    execute(
        prepared,
        descriptor,
        sources,
        packed_weight,
        None,
        residual,
        out,
        accumulate=True,
        narrow=True,
        scales=scale,
    )


def _partial_linear(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str,
    backend: str,
    scale: Sequence[Tensor | None] | None = None,
) -> Tensor:
    _refuse_derivatives("partial_linear", *segments, packed_weight, bias, residual, *(scale or ()))
    sources = [tokens_as_image(x, f"segment {s}") for s, x in enumerate(segments)]
    descriptor = _partial_descriptor(sources, index, out_features, ConvSpec(activation=activation))
    prepared = _backend(backend, packed_weight).prepare(descriptor, packed_weight.dtype)
    added = None if residual is None else tokens_as_image(residual, "residual")
    y = execute(
        prepared, descriptor, sources, packed_weight, bias, added, narrow=True, scales=scale
    )
    return image_as_tokens(y, segments[0].shape[:-1])


def _partial_linear_fake(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str,
    backend: str,
    scale: Sequence[Tensor | None] | None = None,
) -> Tensor:
    shape = (*segments[0].shape[:-1], out_features)
    return segments[0].new_empty(shape, dtype=packed_weight.dtype)


def _gather_descriptor(
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    out_index: Tensor | None,
    spec: ConvSpec,
) -> Conv2dDescriptor:
    inputs = _flat_index(channel_index, "channel_index")
    _check_splits("in_splits", in_splits, inputs)
    if len(in_splits) != len(out_splits):
        raise ValueError(
            f"in_splits and out_splits must have one count a node, given {len(in_splits)} and "
            f"{len(out_splits)}"
        )
    outputs = None
    if out_index is not None:
        outputs = _flat_index(out_index, "out_index")
        _check_splits("out_splits", out_splits, outputs)
        # Channels listed twice would leave others of the fresh output unwritten.
        every = torch.arange(outputs.numel(), dtype=torch.int32, device="cpu")
        if not torch.equal(outputs.sort().values, every):
            raise ValueError(
                f"out_index must list each of the {outputs.numel()} output channels exactly once"
            )
    nodes = []
    in_begin = out_begin = 0
    for in_count, out_count in zip(in_splits, out_splits, strict=True):
        listed = inputs[in_begin : in_begin + in_count]
        target = Channels(out_count, out_begin)
        if outputs is not None:
            target = Channels(out_count, 0, outputs[out_begin : out_begin + out_count])
        nodes.append(Node((Segment(0, Channels(in_count, 0, listed)),), target))
        in_begin += in_count
        out_begin += out_count
    return Conv2dDescriptor(spec, tuple(nodes))


def _gather_conv2d(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    out_index: Tensor | None,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
    winograd: str = "off",
) -> Tensor:
    _refuse_derivatives("gather_conv2d", x, packed_weight, bias, residual)
    spec = _conv_spec(kernel_size, stride, padding, dilation, activation, winograd)
    sources = as_sources([x], x.dtype)
    descriptor = _gather_descriptor(channel_index, in_splits, out_splits, out_index, spec)
    prepared = _backend(backend, packed_weight).prepare(descriptor, packed_weight.dtype)
    return execute(prepared, descriptor, sources, packed_weight, bias, residual)


def _gather_conv2d_fake(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    out_index: Tensor | None,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
    winograd: str = "off",
) -> Tensor:
    size = _fake_size(x, kernel_size, stride, padding, dilation)
    return empty_output(x, sum(out_splits), *size, dtype=x.dtype)


def _gather_linear(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    out_index: Tensor | None,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    _refuse_derivatives("gather_linear", x, packed_weight, bias, residual)
    spec = ConvSpec(activation=activation)
    image = tokens_as_image(x, "x")
    descriptor = _gather_descriptor(channel_index, in_splits, out_splits, out_index, spec)
    prepared = _backend(backend, packed_weight).prepare(descriptor, packed_weight.dtype)
    added = None if residual is None else tokens_as_image(residual, "residual")
    y = execute(prepared, descriptor, [image], packed_weight, bias, added)
    return image_as_tokens(y, x.shape[:-1])


def _gather_linear_fake(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    out_index: Tensor | None,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(out_splits)))


def _prepack_grouped(weight: Tensor, groups: int, backend: str) -> Tensor:
    return _backend(backend, weight).prepack_grouped(weight, _grouped_weight(weight, groups))


def _prepack_grouped_fake(weight: Tensor, groups: int, backend: str) -> Tensor:
    numel = registry.get(backend).grouped_numel(_grouped_weight(weight, groups), weight.dtype)
    return weight.new_empty((numel,))


def _grouped_weight(weight: Tensor, groups: int) -> GroupedDescriptor:
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, I / groups, kh, kw], given {list(weight.shape)}")
    outputs, inputs, *kernel_size = weight.shape
    return grouped_descriptor(ConvSpec(_as_pair(kernel_size)), groups, groups * inputs, outputs)


def _grouped_conv2d(
    x: Tensor,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
) -> Tensor:
    _refuse_derivatives("grouped_conv2d", x, packed_weight, bias, residual)
    image = channels_last(x, "x")
    spec = _conv_spec(kernel_size, stride, padding, dilation, activation, "off")
    descriptor = grouped_descriptor(spec, groups, image.shape[1], out_channels)
    prepared = _backend(backend, packed_weight).prepare_grouped(descriptor, packed_weight.dtype)
    return execute(prepared, descriptor, [image], packed_weight, bias, residual)


def _grouped_conv2d_fake(
    x: Tensor,
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    backend: str,
) -> Tensor:
    size = _fake_size(x, kernel_size, stride, padding, dilation)
    return empty_output(x, out_channels, *size, dtype=x.dtype)


def _gather_pack(
    x: Tensor, channel_index: Tensor, splits: Sequence[int], out: Tensor, backend: str
) -> None:
    _refuse_derivatives("gather_pack_", x, out)
    image = channels_last(x, "x")
    index = _flat_index(channel_index, "channel_index")
    _check_splits("splits", splits, index)
    if out.dtype != x.dtype:
        check_wire_dtype(out.dtype)
    leading = (image.shape[0], image.shape[2], image.shape[3])
    sizes = [message_numel(out.dtype, leading, count) for count in splits]
    if out.dim() != 1 or not out.is_contiguous() or out.numel() != sum(sizes):
        raise ValueError(
            f"out must be one contiguous row of {sum(sizes)} elements in {out.dtype}, for "
            f"{index.numel()} channels of {list(leading)} pixels; given {list(out.shape)} with "
            f"strides {out.stride()}"
        )
    if out.dtype == torch.int8 and out.data_ptr() % 4:
        raise ValueError(
            "out in int8 must begin at a multiple of 4 bytes, where its float32 scales lie, given "
            f"the address {out.data_ptr():#x}"
        )
    chosen = registry.resolve(backend, x.device, x.dtype, "gather_pack")
    prepared = registry.get(chosen).prepare_gather_pack(index.split(list(splits)))
    prepared.run(image, out.split(sizes))


def _mutates_only(*args: object, **kwargs: object) -> None:
    """Fake of an operator that only writes its ``out`` argument."""


for _name, _implementation, _fake in (
    ("prepack", _prepack, _prepack_fake),
    ("partial_conv2d", _partial_conv2d, _partial_conv2d_fake),
    ("partial_conv2d_", _partial_conv2d_accumulate, _mutates_only),
    ("partial_linear", _partial_linear, _partial_linear_fake),
    ("gather_conv2d", _gather_conv2d, _gather_conv2d_fake),
    ("gather_linear", _gather_linear, _gather_linear_fake),
    ("prepack_grouped", _prepack_grouped, _prepack_grouped_fake),
    ("grouped_conv2d", _grouped_conv2d, _grouped_conv2d_fake),
    ("gather_pack_", _gather_pack, _mutates_only),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
