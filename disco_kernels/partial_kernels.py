"""The prepared kernels of one node's part: a convolution or linear over segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from disco_kernels.core import (
    as_sources,
    check_in_place,
    index_tensor,
    tokens_as_image,
)
from disco_kernels.packing import GatherPack
from disco_kernels.prepacking import Packing
from disco_kernels.prepared_kernel import (
    PreparedKernel,
    check_bias,
    check_count,
    check_weight,
    linear_weight,
)
from disco_kernels.quantisation import InputBytes
from disco_kernels.registry import Outgoing
from disco_kernels.spec import Channels, Conv2dDescriptor, ConvSpec, Node, Pair, Segment
from disco_kernels.two_passes import Passes


class _PartialKernel(PreparedKernel):
    def __init__(
        self,
        weight: Tensor,
        segment_channels: Sequence[int],
        spec: ConvSpec,
        *,
        bias: Tensor | None = None,
        index: Sequence[Tensor | Sequence[int] | None] | None = None,
        source_channels: Sequence[int] | None = None,
        image_size: Pair | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
        pack: GatherPack | None = None,
    ) -> None:
        if not segment_channels:
            raise ValueError("give at least one segment; one of no channels is allowed")
        check_weight(weight, sum(segment_channels), spec)
        check_bias(bias, weight)
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
        descriptor = Conv2dDescriptor(spec, (node,))
        super().__init__(
            descriptor, lambda: [weight], weight, bias, backend, image_size, packing, pack
        )

    @property
    def sums_in_parts(self) -> bool:
        """Whether `bind_passes` can be used: float32, summed directly, by the C++ kernels."""
        return self._prepared.sums_in_parts


class PartialConv2d(_PartialKernel):
    """Convolution over the virtual concatenation of segments (DISCO, arXiv 2302.11180, sec. 3).

    Args:
        weight: ``[O, K, kh, kw]``; K runs over the segments' channels, one after the other.
        segment_channels: channels taken from each segment; their sum is K. Zero is allowed.
        spec: geometry and activation (one of `disco_kernels.ACTIVATIONS`).
        bias: ``[O]`` or None.
        index: per segment None (its first channels, in order) or the channels to take.
        image_size: (height, width) of the inputs to expect, for ``spec.winograd == "auto"``;
            other sizes are computed as well. Without it "auto" is "off".
        backend: a name, or None for the automatic choice.
        packing: packs the weights together with those of other kernels, and reads them then; or
            None to pack now.
        pack: which output channels other ranks wait for. A call that is given their messages
            writes them with the output, tile by tile: an exchange then reads nothing again.

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
        messages: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run.

        Args:
            segments: ``[B, C_s, H, W]``, any strides (a channel stride of 1 avoids a copy), of the
                weights' dtype or float16, bfloat16, int8, which are widened as they are read.
            residual: ``[B, O, OH, OW]`` or None, added before the activation.
            out: where to write, channel stride 1, or None for a fresh tensor.
            scale: per segment None or, for int8, float32 ``[G, C_s]``: a row for every ``B / G``
                images (see `message_views`). None if no segment is int8.
            messages: what ``pack(output)`` would write to, or None to pack nothing.

        Returns:
            ``[B, O, OH, OW]`` in channels-last memory.
        """
        check_count(segments, self.descriptor)
        sources = as_sources(segments, self.packed_weight.dtype)
        outgoing = self._outgoing_of(messages, sources[0])
        return self._run(sources, residual, out, True, scale, outgoing)

    def _outgoing_of(self, messages: Sequence[Tensor] | None, source: Tensor) -> Outgoing | None:
        if messages is None:
            return None
        size = self.descriptor.spec.output_size(source.shape[2], source.shape[3])
        return self._outgoing(messages, (source.shape[0], *size), source.device)

    def bind(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        messages: Sequence[Tensor] | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        """The call with these tensors, made ready to be repeated: nothing is checked again.

        Runs once. What it returns computes ``out`` from what the tensors hold by then, keeps them
        alive, and is for one thread at a time. Raises ValueError for segments or a residual that
        had to be copied (a channel stride other than 1), and for scales that are not contiguous.
        """
        check_count(segments, self.descriptor)
        sources = as_sources(segments, self.packed_weight.dtype)
        for s, (x, source) in enumerate(zip(segments, sources, strict=True)):
            check_in_place(f"segment {s}", x, source)
        outgoing = self._outgoing_of(messages, sources[0])
        return self._bind(sources, residual, out, outgoing, scale, narrow=True)

    def bind_passes(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        num_first: int,
        messages: Sequence[Tensor] | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Passes:
        """As `bind`, in one pass and in two, of which the first reads ``num_first`` segments.

        Raises ValueError also where the kernel does not sum in parts (`sums_in_parts`), and for a
        residual in the memory of ``out``.
        """
        self.bind(segments, residual, out, messages, scale)
        sources = as_sources(segments, self.packed_weight.dtype)
        outgoing = self._outgoing_of(messages, sources[0])
        return self._bind_passes(sources, residual, out, num_first, outgoing, scale)


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
        input_bytes: InputBytes | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
        pack: GatherPack | None = None,
    ) -> None:
        super().__init__(
            linear_weight(weight),
            segment_channels,
            ConvSpec(activation=activation, input_bytes=input_bytes),
            bias=bias,
            index=index,
            backend=backend,
            packing=packing,
            pack=pack,
        )

    def __call__(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None = None,
        out: Tensor | None = None,
        scale: Sequence[Tensor | None] | None = None,
        messages: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Segments ``[..., C_s]``, residual ``[..., O]`` or None -> ``[..., O]``.

        ``out``, if given, is contiguous ``[..., O]``, written and returned. ``scale`` of an int8
        segment is ``[G, C_s]``, a row for every ``tokens / G`` tokens. ``messages`` as for
        `PartialConv2d`.
        """
        check_count(segments, self.descriptor)
        images = [tokens_as_image(x, f"segment {s}") for s, x in enumerate(segments)]
        leading = segments[0].shape[:-1]
        outgoing = self._outgoing(messages, leading, segments[0].device)
        return self._run_tokens(images, residual, out, leading, True, scale, outgoing)

    def bind(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        messages: Sequence[Tensor] | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        """As `PartialConv2d.bind`; ``out`` is contiguous."""
        check_count(segments, self.descriptor)
        outgoing = self._outgoing(messages, segments[0].shape[:-1], segments[0].device)
        return self._bind_tokens(segments, residual, out, outgoing, scale, narrow=True)

    def bind_passes(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        num_first: int,
        messages: Sequence[Tensor] | None = None,
        scale: Sequence[Tensor | None] | None = None,
    ) -> Passes:
        """As `PartialConv2d.bind_passes`."""
        self.bind(segments, residual, out, messages, scale)
        images = [tokens_as_image(x, f"segment {s}") for s, x in enumerate(segments)]
        added = None if residual is None else tokens_as_image(residual, "residual")
        outgoing = self._outgoing(messages, segments[0].shape[:-1], segments[0].device)
        return self._bind_passes(
            images, added, tokens_as_image(out, "out"), num_first, outgoing, scale
        )
