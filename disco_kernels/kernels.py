"""Prepared kernels: weights packed once, then called as often as needed, past the dispatcher.

These are what an executor uses. They are for inference: they record no gradient. Users of modules
want `disco_kernels.swap_`, users of tensors the operators in `disco_kernels.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import (
    as_sources,
    channel_run,
    channels_last,
    check_in_place,
    check_scales_in_place,
    execute,
    image_as_tokens,
    index_tensor,
    tokens_as_image,
)
from disco_kernels.packing import GatherPack
from disco_kernels.pattern import LayerPattern, Ownership, Selected, check_ownership
from disco_kernels.prepacking import Alternative, PackedKernel, Packing
from disco_kernels.quantisation import MOST_PRODUCTS, InputBytes
from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import Channels, Conv2dDescriptor, ConvSpec, Node, Pair, Segment
from disco_kernels.two_passes import Passes, bind_passes
from disco_kernels.winograd import alternatives_of, multiplications_saved
from disco_kernels.wire import num_images

# Per node its weights ``[O, K, kh, kw]``, made as they are asked for.
NodeWeights = Callable[[], Iterable[Tensor]]


class _PreparedKernel(PackedKernel):
    """A descriptor, its packed weights and bias, bound to one backend."""

    def __init__(
        self,
        descriptor: Conv2dDescriptor,
        node_weights: NodeWeights,
        like: Tensor,
        bias: Tensor | None,
        backend: str | None,
        image_size: Pair | None = None,
        packing: Packing | None = None,
        pack: GatherPack | None = None,
    ) -> None:
        if pack is not None and pack.channels_needed > descriptor.out_channels:
            raise ValueError(
                f"pack lists channel {pack.channels_needed - 1}; the kernel computes "
                f"{descriptor.out_channels}"
            )
        self.pack = pack
        self.backend = registry.resolve(backend, like.device, like.dtype)
        if descriptor.spec.input_bytes is not None:
            registry.require_int8(self.backend)
            _check_products(descriptor)
        self.descriptor = descriptor
        self.dtype = like.dtype
        self.image_size = image_size
        self._unpacked: NodeWeights | None = node_weights
        self.bias = None if bias is None else bias.detach().clone()
        self._pack_in(packing)

    @property
    def algorithm(self) -> str:
        return self.descriptor.spec.algorithm

    def _alternatives(self) -> list[Alternative]:
        spec, nodes = self.descriptor.spec, self.descriptor.nodes
        # One algorithm for the whole layer, chosen by its largest node.
        allowed = alternatives_of(
            spec,
            max(node.out_channels.count for node in nodes),
            max(node.num_in_channels for node in nodes),
            self.image_size,
            self.backend,
            self.dtype,
        )
        pairs = sum(node.out_channels.count * node.num_in_channels for node in nodes)
        # Where there is no choice the size is not looked at: the inputs' may be another.
        size = self.image_size if len(allowed) > 1 else None
        pixels = math.prod(spec.output_size(*size)) if size else 0
        return [
            Alternative(
                algorithm,
                self._bytes_with(algorithm),
                multiplications_saved(algorithm, pairs, pixels),
            )
            for algorithm in allowed
        ]

    def _bytes_with(self, algorithm: str) -> int:
        backend, taps = registry.get(self.backend), math.prod(self.descriptor.spec.kernel_size)
        numel = sum(
            backend.packed_numel(
                node.out_channels.count, node.segment_channels, taps, self.dtype, algorithm
            )
            for node in self.descriptor.nodes
        )
        return numel * self.dtype.itemsize

    def _pack(self, algorithm: str) -> Tensor:
        assert self._unpacked is not None
        weights, whole = self._unpacked(), self.descriptor.spec.input_bytes is not None
        spec = replace(self.descriptor.spec, winograd="off" if whole else algorithm)
        self.descriptor = Conv2dDescriptor(spec, self.descriptor.nodes)
        backend = registry.get(self.backend)
        return torch.cat(
            [
                backend.prepack(weight, node.segment_channels, algorithm)
                for node, weight in zip(self.descriptor.nodes, weights, strict=True)
            ]
        )

    def _prepare(self) -> PreparedConv2d:
        index = self.pack.index if self.pack else ()
        return registry.get(self.backend).prepare(self.descriptor, self.dtype, index)

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
        outgoing: Outgoing | None = None,
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
            outgoing=outgoing,
        )

    def _outgoing(
        self, messages: Sequence[Tensor] | None, leading: Sequence[int], device: torch.device
    ) -> Outgoing | None:
        if messages is None:
            return None
        if self.pack is None:
            raise ValueError("messages are given, and this kernel was made without a pack")
        self.pack.check_messages(messages, leading, self.packed_weight.dtype, device)
        return Outgoing(messages, num_images(leading))

    def _run_tokens(
        self,
        images: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor | None,
        leading: Sequence[int],
        narrow: bool = False,
        scale: Sequence[Tensor | None] | None = None,
        outgoing: Outgoing | None = None,
    ) -> Tensor:
        added = None if residual is None else tokens_as_image(residual, "residual")
        if out is None:
            result = self._run(images, added, None, narrow, scale, outgoing)
            return image_as_tokens(result, leading)
        wanted = (*leading, self.out_channels)
        if tuple(out.shape) != wanted or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {list(wanted)}, given {list(out.shape)} with strides "
                f"{out.stride()}"
            )
        self._run(images, added, tokens_as_image(out, "out"), narrow, scale, outgoing)
        return out

    def _bind_tokens(
        self,
        segments: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        outgoing: Outgoing | None = None,
        scale: Sequence[Tensor | None] | None = None,
        narrow: bool = False,
    ) -> Callable[[], None]:
        images = [tokens_as_image(x, f"segment {s}") for s, x in enumerate(segments)]
        for s, (x, image) in enumerate(zip(segments, images, strict=True)):
            check_in_place(f"segment {s}", x, image)
        check_scales_in_place(scale)
        added = None if residual is None else tokens_as_image(residual, "residual")
        if residual is not None and added is not None:
            check_in_place("residual", residual, added)
        leading = segments[0].shape[:-1]
        self._run_tokens(images, residual, out, leading, narrow, scale, outgoing)
        target = tokens_as_image(out, "out")
        return self._prepared.bind(
            images, self.packed_weight, self.bias, added, target, outgoing, scale
        )

    def _bind(
        self,
        sources: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        outgoing: Outgoing | None = None,
        scale: Sequence[Tensor | None] | None = None,
        narrow: bool = False,
    ) -> Callable[[], None]:
        check_scales_in_place(scale)
        if residual is not None:
            check_in_place("residual", residual, channels_last(residual, "residual"))
        # Computes once as any call does, checks included.
        self._run(sources, residual, out, narrow, scale, outgoing)
        return self._prepared.bind(
            sources, self.packed_weight, self.bias, residual, out, outgoing, scale
        )

    def _bind_passes(
        self,
        sources: Sequence[Tensor],
        residual: Tensor | None,
        out: Tensor,
        num_first: int,
        outgoing: Outgoing | None,
        scale: Sequence[Tensor | None] | None,
    ) -> Passes:
        return bind_passes(
            self._prepared,
            sources,
            self.packed_weight,
            self.bias,
            residual,
            out,
            num_first,
            outgoing,
            scale,
        )


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
        image_size: Pair | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
        pack: GatherPack | None = None,
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
        _check_count(segments, self.descriptor)
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
        _check_count(segments, self.descriptor)
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
            _linear_weight(weight),
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
        _check_count(segments, self.descriptor)
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
        _check_count(segments, self.descriptor)
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
        image_size: Pair | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
    ) -> None:
        _check_weight(weight, in_ownership.num_channels, spec)
        _check_bias(bias, weight)
        check_ownership(weight, out_ownership, in_ownership)
        pattern = LayerPattern(out_ownership, in_ownership, selected)
        nodes, rows_and_columns = [], []
        for rank, outputs in enumerate(out_ownership.channels):
            parts = _segments_of(pattern.input_channels(rank), weight.dtype, spec)
            segments = tuple(Segment(0, channel_run(part)) for part in parts)
            inputs = [channel for part in parts for channel in part]
            for rows in _output_runs(outputs):
                nodes.append(Node(segments, channel_run(rows)))
                rows_and_columns.append((list(rows), inputs))
        self.in_channels = in_ownership.num_channels

        def node_weights() -> Iterator[Tensor]:
            for rows, columns in rows_and_columns:
                yield weight.detach()[rows][:, columns]

        def dense_weight() -> Iterator[Tensor]:
            dense = torch.zeros_like(weight)
            for (rows, columns), block in zip(rows_and_columns, node_weights(), strict=True):
                dense[_positions(rows)[:, None], _positions(columns)] = block
            yield dense

        descriptor = Conv2dDescriptor(spec, tuple(nodes))
        chosen = registry.get(registry.resolve(backend, weight.device, weight.dtype))
        node_weights_of: NodeWeights = node_weights
        if chosen.dense_is_faster(descriptor, weight.dtype):
            whole = Node((Segment(0, Channels(weight.shape[1])),), Channels(weight.shape[0]))
            descriptor, node_weights_of = Conv2dDescriptor(spec, (whole,)), dense_weight
        super().__init__(descriptor, node_weights_of, weight, bias, backend, image_size, packing)

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
        spec, bias, image_size, backend, packing: as for `PartialConv2d`.
    """

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``[B, I, H, W]`` -> ``[B, O, OH, OW]`` in channels-last memory."""
        return self._run([self._input(*as_sources([x], x.dtype))], residual, out)

    def bind(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`."""
        sources = as_sources([self._input(x)], self.packed_weight.dtype)
        check_in_place("segment 0", x, sources[0])
        return self._bind(sources, residual, out)


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
        input_bytes: InputBytes | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
    ) -> None:
        super().__init__(
            _linear_weight(weight),
            out_ownership,
            in_ownership,
            selected,
            ConvSpec(activation=activation, input_bytes=input_bytes),
            bias=bias,
            backend=backend,
            packing=packing,
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        image = self._input(tokens_as_image(x, "x"))
        return self._run_tokens([image], residual, out, x.shape[:-1])

    def bind(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`; ``out`` is contiguous."""
        self._input(tokens_as_image(x, "x"))
        return self._bind_tokens([x], residual, out)


# Heads of attention are shared out as runs of queries, keys and values. Writing into a run costs
# nothing; outputs here and there are copied one by one.
_SHORTEST_OUTPUT_RUN = 16


def _output_runs(outputs: Sequence[int]) -> list[list[int]]:
    """A node's outputs as runs, each computed like a node of its own; or all, if some are short."""
    runs: list[list[int]] = []
    for channel in outputs:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    return runs if min(map(len, runs), default=0) >= _SHORTEST_OUTPUT_RUN else [list(outputs)]


# A shorter run of channels is copied together with the single ones (16 bytes of bfloat16).
_SHORTEST_RUN = 8


def _segments_of(channels: Sequence[int], dtype: torch.dtype, spec: ConvSpec) -> list[list[int]]:
    """How a node reads a list of channels.

    Float32 kernels read any list in place, and bytes are made of any list. In bfloat16 two
    neighbours make one operand: long runs are read in place, the other channels are packed together
    before the sums begin.
    """
    if dtype != torch.bfloat16 or spec.input_bytes is not None:
        return [list(channels)]
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    in_place = [run[: len(run) // 2 * 2] for run in runs if len(run) >= _SHORTEST_RUN]
    taken = {channel for run in in_place for channel in run}
    others = [channel for channel in channels if channel not in taken]
    return [*in_place, others] if others or not in_place else in_place


def _positions(channels: Sequence[int]) -> Tensor:
    return torch.tensor(channels, dtype=torch.int64, device="cpu")


def _check_products(descriptor: Conv2dDescriptor) -> None:
    widest = max(node.num_in_channels for node in descriptor.nodes)
    products = widest * math.prod(descriptor.spec.kernel_size)
    if products > MOST_PRODUCTS:
        raise ValueError(
            f"an output is the sum of {products} products; of 8-bit integers at most "
            f"{MOST_PRODUCTS} fit into 32 bits: compute this layer in another dtype"
        )


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
