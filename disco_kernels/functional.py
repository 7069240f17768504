"""The operators as functions: plain arguments, documented shapes.

They go through torch's dispatcher (`torch.compile` sees them) and record no gradient. Backends
that cannot serve the tensors raise; nothing falls back here, because a packed weight belongs to
the backend that packed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disco_kernels import _ops as _ops
from disco_kernels import registry
from disco_kernels.spec import pair

_IntOrPair = int | Sequence[int]


def prepack(
    weight: Tensor, segment_channels: Sequence[int], *, backend: str, winograd: str = "off"
) -> Tensor:
    """Lay a weight out for a backend, once.

    Args:
        weight: ``[O, K, kh, kw]`` or ``[O, K]``, K over the segments one after the other.
        segment_channels: channels taken from each segment; their sum is K.
        backend: ``"reference"`` or ``"cpu"``.
        winograd: ``"off"``, or ``"f2"`` or ``"f4"`` for Winograd F(2x2, 3x3) or F(4x4, 3x3), of
            kernels of 3 x 3 with stride and dilation 1 on the ``"cpu"`` backend. The calls that
            read the packed weight name the same. ``"auto"`` is refused: resolve it with
            `disco_kernels.choose_winograd` first.

    Returns:
        A 1-D tensor whose layout is the backend's own. Several nodes' packed weights for
        `gather_conv2d` are joined with ``torch.cat``.

    Raises:
        ValueError: a weight or an algorithm that does not fit.
    """
    return torch.ops.disco_kernels.prepack(weight, list(segment_channels), backend, winograd)


def partial_conv2d(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    *,
    out_channels: int,
    kernel_size: _IntOrPair,
    stride: _IntOrPair = 1,
    padding: _IntOrPair = 0,
    dilation: _IntOrPair = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    scale: Sequence[Tensor | None] | None = None,
    backend: str,
    winograd: str = "off",
) -> Tensor:
    """Convolution over the virtual concatenation of the segments' channels.

    Args:
        segments: ``[B, C_s, H, W]`` each: an activation, or a received payload
            ``[B, H, W, n]`` seen as ``payload.permute(0, 3, 1, 2)``, which is read in place. Of the
            weights' dtype or float16, bfloat16, int8, which are widened as they are read.
        index: per segment None (all its channels) or the channels to take, int32 ``[n_s]``.
        packed_weight: from `prepack` with the same segments, for the same backend.
        out_channels: O, which a packed weight does not tell.
        kernel_size, stride, padding, dilation: in pixels, one number or (height, width).
        bias: ``[O]`` or None.
        residual: ``[B, O, OH, OW]`` or None, added before the activation.
        activation: one of `disco_kernels.ACTIVATIONS` (``"none"``, ``"relu"``, ``"gelu"``, ...);
            `ConvSpec` says what they compute.
        scale: per segment None or, for int8, float32 ``[G, C_s]``: a row for every ``B / G`` images
            (see `message_views`). None if no segment is int8.
        backend: the one that packed the weight.
        winograd: as given to `prepack`.

    Returns:
        ``[B, O, OH, OW]`` in channels-last memory.

    Raises:
        ValueError: shapes, dtypes, channels or a packed weight that do not fit.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or has a tangent.
    """
    return torch.ops.disco_kernels.partial_conv2d(
        list(segments),
        list(index),
        packed_weight,
        bias,
        residual,
        out_channels,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        activation,
        backend,
        winograd,
        None if scale is None else list(scale),
    )


def partial_conv2d_(
    out: Tensor,
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    *,
    kernel_size: _IntOrPair,
    stride: _IntOrPair = 1,
    padding: _IntOrPair = 0,
    dilation: _IntOrPair = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    scale: Sequence[Tensor | None] | None = None,
    backend: str,
    winograd: str = "off",
) -> None:
    """Add a second pass onto ``out``, an earlier result without activation.

    ``out`` ``[B, O, OH, OW]`` holds the sum so far, bias included, with a channel stride of 1;
    residual and activation are applied after the addition. Otherwise as `partial_conv2d`.
    """
    torch.ops.disco_kernels.partial_conv2d_(
        out,
        list(segments),
        list(index),
        packed_weight,
        residual,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        activation,
        backend,
        winograd,
        None if scale is None else list(scale),
    )


def partial_linear(
    segments: Sequence[Tensor],
    index: Sequence[Tensor | None],
    packed_weight: Tensor,
    *,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    scale: Sequence[Tensor | None] | None = None,
    backend: str,
) -> Tensor:
    """`partial_conv2d` over tokens: segments ``[..., C_s]`` -> ``[..., out_features]``.

    ``scale`` of an int8 segment is ``[G, C_s]``, a row for every ``tokens / G`` tokens.
    """
    return torch.ops.disco_kernels.partial_linear(
        list(segments),
        list(index),
        packed_weight,
        bias,
        residual,
        out_features,
        activation,
        backend,
        None if scale is None else list(scale),
    )


def gather_conv2d(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    packed_weight: Tensor,
    *,
    kernel_size: _IntOrPair,
    stride: _IntOrPair = 1,
    padding: _IntOrPair = 0,
    dilation: _IntOrPair = 1,
    out_index: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str,
    winograd: str = "off",
) -> Tensor:
    """All virtual nodes of a layer on one device, in one call.

    Args:
        x: ``[B, I, H, W]``.
        channel_index: int32, every node's input channels one after the other.
        in_splits: how many of them belong to each node.
        out_splits: output channels of each node; their sum is O.
        packed_weight: every node's `prepack`, joined.
        out_index: int32 ``[O]``, the output channels of the nodes one after the other; None if
            node 0 owns the first ones, node 1 the next, and so on.
        bias, residual, activation, backend, winograd and the geometry: as for `partial_conv2d`.

    Returns:
        ``[B, O, OH, OW]`` in channels-last memory.
    """
    return torch.ops.disco_kernels.gather_conv2d(
        x,
        channel_index,
        list(in_splits),
        list(out_splits),
        out_index,
        packed_weight,
        bias,
        residual,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        activation,
        backend,
        winograd,
    )


def gather_linear(
    x: Tensor,
    channel_index: Tensor,
    in_splits: Sequence[int],
    out_splits: Sequence[int],
    packed_weight: Tensor,
    *,
    out_index: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str,
) -> Tensor:
    """`gather_conv2d` over tokens: ``x`` ``[..., I]`` -> ``[..., O]``."""
    return torch.ops.disco_kernels.gather_linear(
        x,
        channel_index,
        list(in_splits),
        list(out_splits),
        out_index,
        packed_weight,
        bias,
        residual,
        activation,
        backend,
    )


def prepack_grouped(weight: Tensor, groups: int, *, backend: str) -> Tensor:
    """Lay the weight of a grouped convolution out for a backend, once.

    Args:
        weight: ``[O, I / groups, kh, kw]``, as ``nn.Conv2d`` has it.
        groups: divides I and O; I for a depthwise convolution.
        backend: ``"reference"`` or ``"cpu"``.

    Returns:
        A 1-D tensor whose layout is the backend's own.
    """
    return torch.ops.disco_kernels.prepack_grouped(weight, groups, backend)


def grouped_conv2d(
    x: Tensor,
    packed_weight: Tensor,
    *,
    out_channels: int,
    groups: int,
    kernel_size: _IntOrPair,
    stride: _IntOrPair = 1,
    padding: _IntOrPair = 0,
    dilation: _IntOrPair = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str,
) -> Tensor:
    """A grouped convolution, depthwise included: group g reads the g-th run of input channels.

    Args:
        x: ``[B, I, H, W]``; a channel stride of 1 avoids a copy.
        packed_weight: from `prepack_grouped` with the same groups, for the same backend.
        out_channels: O, which a packed weight does not tell.
        groups: divides I and O.
        bias, residual, activation, backend and the geometry: as for `partial_conv2d`.

    Returns:
        ``[B, O, OH, OW]`` in channels-last memory.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or has a tangent.
    """
    return torch.ops.disco_kernels.grouped_conv2d(
        x,
        packed_weight,
        bias,
        residual,
        out_channels,
        groups,
        pair(kernel_size, "kernel_size"),
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        activation,
        backend,
    )


def gather_pack_(
    x: Tensor,
    channel_index: Tensor,
    splits: Sequence[int],
    out: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the selected channels of ``x`` for all destinations, in one pass.

    Args:
        x: ``[B, C, H, W]``.
        channel_index: int32, every destination's channels one after the other.
        splits: how many of them belong to each destination.
        out: 1-D, the messages one after the other. Its dtype is the wire dtype: that of ``x``,
            float32, float16, bfloat16 or int8. A message is ``[B, H, W, splits[d]]``, in int8 with
            its scales before it and `message_numel` bytes long; `message_views` takes it apart.
        backend: a name, or None for the automatic choice.

    Raises:
        ValueError: sizes, dtypes or channels that do not fit.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or has a tangent.
    """
    name = registry.resolve(backend, x.device, x.dtype, "gather_pack")
    torch.ops.disco_kernels.gather_pack_(x, channel_index, list(splits), out, name)
