"""Prepared kernels: weights packed once, then called as often as needed, past the dispatcher.

These are what an executor uses. They are for inference: they record no gradient. Users of modules
want `disco_kernels.swap_`, users of tensors the operators in `disco_kernels.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import (
    as_sources,
    channel_run,
    execute,
    image_as_tokens,
    index_tensor,
    tokens_as_image,
)
from disco_kernels.pattern import LayerPattern, Ownership, Selected, check_ownership
from disco_kernels.spec import Channels, Conv2dDescriptor, ConvSpec, Node, Segment


class _PreparedKernel:
    """A descriptor, its packed weights and bias, bound to one backend."""

    def __init__(
        self,
        descriptor: Conv2dDescriptor,
        node_weights: Sequence[Tensor],
        bias: Tensor | None,
        backend: str | None,
    ) -> None:
        like = node_weights[0]
        self.descriptor = descriptor
        self.backend = registry.resolve(backend, like.device, like.dtype)
        chosen = registry.get(self.backend)
        self.packed_weight = torch.cat(
            [
                chosen.prepack(weight, node.segment_channels)
                for node, weight in zip(descriptor.nodes, node_weights, strict=True)
            ]
        )
        self.bias = None if bias is None else bias.detach().clone()
        self._prepared = chosen.prepare(descriptor)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, the kernel's own header included."""
        return self.packed_weight.numel() * self.packed_weight.element_size()

    @property
    def out_channels(self) -> int:
        return self.descriptor.out_channels

    def _run(
        self,
        sources: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor | None,
        narrow: bool = False,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        return execute(
            self._prepared,
            self.descriptor,
            sources,
            self.packed_weight,
            self.bias,
            residual,
            out,
            narrow=narrow,
            scales=scale,
        )

    # The backend's part holds addresses, so copies and pickles make their own.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_prepared"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepared = registry.get(self.backend).prepare(self.descriptor)


class _PartialKernel(_PreparedKernel):
    def __init__(
        self,
        weight: Tensor,
        segment_channels: Sequence[int],
        spec: ConvSpec,
        *,
        bias: Tensor | None = None,
        index: Sequence[Tensor | Sequence[int] | None] | None = None,
        source_channels: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        if not segment_channels:
            raise ValueError("give at least one segment; one of no channels is allowed")
        _check_weight(weight, sum(segment_channels), spec)
        _check_bias(bias, weight)
        indices = list(index) if index is not None else [None] * len(segment_channels)
        if len(indices) != len(segment_channels):
            raise ValueError(
                f"{len(segment_channels)} segments need as many indices (None for a whole "
                f"segment), given {len(indices)}"
            )
        segments = []
        for s, (count, listed) in enumerate(zip(segment_channels, indices, strict=True)):
            channels = Channels(count)
            if listed is not None:
                limit = source_channels[s] if source_channels else 2**31 - 1
                values = index_tensor(listed, limit, f"index[{s}]")
                if values.numel() != count:
                    raise ValueError(
                        f"index[{s}] lists {values.numel()} channels, segment_channels says {count}"
                    )
                channels = Channels(count, 0, values)
            segments.append(Segment(s, channels))
        node = Node(tuple(segments), Channels(weight.shape[0]))
        super().__init__(Conv2dDescriptor(spec, (node,)), [weight], bias, backend)


class PartialConv2d(_PartialKernel):
    """Convolution over the virtual concatenation of segments (DISCO, arXiv 2302.11180, sec. 3).

    Args:
        weight: ``[O, K, kh, kw]``; K runs over the segments' channels, one after the other.
        segment_channels: channels taken from each segment; their sum is K. Zero is allowed.
        spec: geometry and activation.
        bias: ``[O]`` or None.
        index: per segment None (its first channels, in order) or the channels to take.
        backend: a name, or None for the automatic choice.

    Raises:
        ValueError: shapes that do not fit each other.
        BackendUnavailable: ``backend`` cannot serve this dtype and device.
    """

    def __call__(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None = None,
        out: Tensor | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Run.

        Args:
            segments: ``[B, C_s, H, W]``, any strides (a channel stride of 1 avoids a copy), of the
                weights' dtype or float16, bfloat16, int8, which are widened as they are read.
            residual: ``[B, O, OH, OW]`` or None, added before the activation.
            out: where to write, channel stride 1, or None for a fresh tensor.
            scale: per segment None or, for int8, float32 ``[G, C_s]``: a row for every ``B / G``
                images (see `message_views`). None if no segment is int8.

        Returns:
            ``[B, O, OH, OW]`` in channels-last memory.
        """
        _check_count(segments, self.descriptor)
        return self._run(as_sources(segments), residual, out, True, scale)


class PartialLinear(_PartialKernel):
    """`PartialConv2d` over tokens: segments ``[..., C_s]``, weight ``[O, K]``."""

    def __init__(
        self,
        weight: Tensor,
        segment_channels: Sequence[int],
        *,
        bias: Tensor | None = None,
        index: Sequence[Tensor | Sequence[int] | None] | None = None,
        activation: str = "none",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            _linear_weight(weight),
            segment_channels,
            ConvSpec(activation=activation),
            bias=bias,
            index=index,
            backend=backend,
        )

    def __call__(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Segments ``[..., C_s]``, residual ``[..., O]`` or None -> ``[..., O]``.

        ``scale`` of an int8 segment is ``[G, C_s]``, a row for every ``tokens / G`` tokens.
        """
        _check_count(segments, self.descriptor)
        images = [tokens_as_image(x, f"segment {s}") for s, x in enumerate(segments)]
        added = None if residual is None else tokens_as_image(residual, "residual")
        y = self._run(images, added, None, True, scale)
        return image_as_tokens(y, segments[0].shape[:-1])


class _GatherKernel(_PreparedKernel):
    def __init__(
        self,
        weight: Tensor,
        out_ownership: Ownership,
        in_ownership: Ownership,
        selected: Selected,
        spec: ConvSpec,
        *,
        bias: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        _check_weight(weight, in_ownership.num_channels, spec)
        _check_bias(bias, weight)
        check_ownership(weight, out_ownership, in_ownership)
        pattern = LayerPattern(out_ownership, in_ownership, selected)
        nodes, weights = [], []
        for rank, outputs in enumerate(out_ownership.channels):
            inputs = pattern.input_channels(rank)
            nodes.append(Node((Segment(0, channel_run(inputs)),), channel_run(outputs)))
            weights.append(weight.detach()[list(outputs)][:, list(inputs)])
        self.in_channels = in_ownership.num_channels
        super().__init__(Conv2dDescriptor(spec, tuple(nodes)), weights, bias, backend)

    def _input(self, image: Tensor) -> Tensor:
        # The nodes read listed channels: an input with more of them would go unnoticed.
        if image.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, given {image.shape[1]}")
        return image


class GatherConv2d(_GatherKernel):
    """All virtual nodes of a layer on one device, in one call.

    Every node computes its own output channels from its own and its selected input channels.
    Equal to the dense convolution when everything outside the pattern is zero.

    Args:
        weight: ``[O, I, kh, kw]``, dense; what lies outside the pattern is not read.
        out_ownership, in_ownership: who owns which of the O outputs and I inputs.
        selected: ``selected[i][j]``, see `disco_kernels.find_selected`.
        spec, bias, backend: as for `PartialConv2d`.
    """

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``[B, I, H, W]`` -> ``[B, O, OH, OW]`` in channels-last memory."""
        return self._run([self._input(*as_sources([x]))], residual, out)


class GatherLinear(_GatherKernel):
    """`GatherConv2d` over tokens: weight ``[O, I]``, ``x`` ``[..., I]`` -> ``[..., O]``."""

    def __init__(
        self,
        weight: Tensor,
        out_ownership: Ownership,
        in_ownership: Ownership,
        selected: Selected,
        *,
        bias: Tensor | None = None,
        activation: str = "none",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            _linear_weight(weight),
            out_ownership,
            in_ownership,
            selected,
            ConvSpec(activation=activation),
            bias=bias,
            backend=backend,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        added = None if residual is None else tokens_as_image(residual, "residual")
        image = self._input(tokens_as_image(x, "x"))
        return image_as_tokens(self._run([image], added, None), x.shape[:-1])


def _check_weight(weight: Tensor, in_channels: int, spec: ConvSpec) -> None:
    wanted = (in_channels, *spec.kernel_size)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != wanted:
        raise ValueError(
            f"weight must be [O, {wanted[0]}, {wanted[1]}, {wanted[2]}] for these segments and "
            f"this kernel, given {list(weight.shape)}"
        )


def _linear_weight(weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [O, K], given {list(weight.shape)}")
    return weight[:, :, None, None]


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must be [{weight.shape[0]}] {weight.dtype} as the weight, given "
            f"{list(bias.shape)} {bias.dtype}"
        )


def _check_count(segments: Sequence[Tensor], descriptor: Conv2dDescriptor) -> None:
    wanted = len(descriptor.nodes[0].segments)
    if len(segments) != wanted:
        raise ValueError(f"this layer reads {wanted} segments, given {len(segments)}")
