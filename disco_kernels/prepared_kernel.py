"""Prepared kernels: weights packed once, then called as often as needed, past the dispatcher.

These are what an executor uses. They are for inference: a call that would drop a gradient or a
tangent raises RuntimeError (what is bound is not checked again). Users of modules want
`disco_kernels.swap_`, users of tensors the operators in `disco_kernels.functional`. This is what
all have in common; `partial_kernels` and `gather_kernels` have those of one node and of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import (
    channels_last,
    check_in_place,
    check_scales_in_place,
    execute,
    image_as_tokens,
    refuse_derivatives,
    tokens_as_image,
)
from disco_kernels.packing import GatherPack
from disco_kernels.prepacking import Alternative, PackedKernel, Packing
from disco_kernels.quantisation import MOST_PRODUCTS
from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import Conv2dDescriptor, ConvSpec, Node, Pair
from disco_kernels.two_passes import Passes, bind_passes
from disco_kernels.winograd import alternatives_of, multiplications_saved
from disco_kernels.wire import num_images

# Per node its weights ``[O, K, kh, kw]``, made as they are asked for.
NodeWeights = Callable[[], Iterable[Tensor]]


class PreparedKernel(PackedKernel):
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
        beside: Node | None = None,
    ) -> None:
        """``beside`` is one more node whose weights ``node_weights`` has, behind the others'; see
        `Backend.dense_beside`."""
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
        self._packed_nodes = descriptor.nodes if beside is None else (*descriptor.nodes, beside)
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
            for node in self._packed_nodes
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
                for node, weight in zip(self._packed_nodes, weights, strict=True)
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
        refuse_derivatives(type(self).__name__, *sources, residual, out)
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


def _check_products(descriptor: Conv2dDescriptor) -> None:
    widest = max(node.num_in_channels for node in descriptor.nodes)
    products = widest * math.prod(descriptor.spec.kernel_size)
    if products > MOST_PRODUCTS:
        raise ValueError(
            f"an output is the sum of {products} products; of 8-bit integers at most "
            f"{MOST_PRODUCTS} fit into 32 bits: compute this layer in another dtype"
        )


def check_weight(weight: Tensor, in_channels: int, spec: ConvSpec) -> None:
    wanted = (in_channels, *spec.kernel_size)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != wanted:
        raise ValueError(
            f"weight must be [O, {wanted[0]}, {wanted[1]}, {wanted[2]}] for these segments and "
            f"this kernel, given {list(weight.shape)}"
        )


def linear_weight(weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [O, K], given {list(weight.shape)}")
    return weight[:, :, None, None]


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must be [{weight.shape[0]}] {weight.dtype} as the weight, given "
            f"{list(bias.shape)} {bias.dtype}"
        )


def check_count(segments: Sequence[Tensor], descriptor: Conv2dDescriptor) -> None:
    wanted = len(descriptor.nodes[0].segments)
    if len(segments) != wanted:
        raise ValueError(f"this layer reads {wanted} segments, given {len(segments)}")
