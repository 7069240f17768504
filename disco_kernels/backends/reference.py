"""Plain torch: the default where nothing faster fits, and the oracle of the tests.

Any device, any floating dtype. A packed weight is the weight itself, flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from disco_kernels.quantisation import InputBytes, input_bytes, weight_bytes
from disco_kernels.registry import (
    Backend,
    Outgoing,
    PreparedConv2d,
    PreparedGatherPack,
    register,
)
from disco_kernels.spec import (
    ACTIVATIONS,
    Channels,
    Conv2dDescriptor,
    ConvSpec,
    GroupedDescriptor,
)
from disco_kernels.wire import widened, write_int8

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
}
assert tuple(_ACTIVATION) == ACTIVATIONS


def _take(x: Tensor, channels: Channels) -> Tensor:
    if channels.index is not None:
        return x.index_select(1, _checked(channels.index, x.shape[1]).to(x.device))
    return x.narrow(1, channels.first, channels.count)


def _checked(index: Tensor, num_channels: int) -> Tensor:
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_channels:
        raise ValueError(
            f"channels {int(index.min())} to {int(index.max())} are listed, but only 0 to "
            f"{num_channels - 1} exist"
        )
    return index


class _ReferenceConv2d(PreparedConv2d):
    def __init__(self, descriptor: Conv2dDescriptor, pack: Sequence[Tensor]) -> None:
        self.descriptor = descriptor
        self.pack = _ReferenceGatherPack(pack)

    @torch.no_grad()
    def run(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None = None,
        outgoing: Outgoing | None = None,
    ) -> None:
        if any(x.dtype != packed_weight.dtype for x in sources):
            scales = scales or [None] * len(sources)
            sources = [
                x if x.dtype == packed_weight.dtype else widened(x, scale, packed_weight.dtype)
                for x, scale in zip(sources, scales, strict=True)
            ]
        spec = self.descriptor.spec
        taps = spec.kernel_size[0] * spec.kernel_size[1]
        wanted = sum(n.out_channels.count * n.num_in_channels for n in self.descriptor.nodes) * taps
        if packed_weight.numel() != wanted:
            raise ValueError(
                f"the packed weights hold {packed_weight.numel()} values, this layer has {wanted}: "
                "pack them again for this backend (prepack, or repack() of the module)"
            )
        begin = 0
        for node in self.descriptor.nodes:
            shape = (node.out_channels.count, node.num_in_channels, *spec.kernel_size)
            numel = shape[0] * shape[1] * shape[2] * shape[3]
            weight = packed_weight[begin : begin + numel].reshape(shape)
            begin += numel
            if shape[0] == 0:
                continue
            parts = [_take(sources[s.source], s.channels) for s in node.segments]
            x = torch.cat(parts, dim=1)
            if spec.input_bytes is None:
                y = _conv2d(x, weight, spec, out)
            else:
                y = _conv2d_of_bytes(x, weight, spec, spec.input_bytes, out)
            target = node.out_channels.index
            rows = (
                torch.arange(
                    node.out_channels.first, node.out_channels.first + shape[0], device=out.device
                )
                if target is None
                else _checked(target, out.shape[1]).to(out.device, torch.long)
            )
            if accumulate:
                y = y + out.index_select(1, rows)
            elif bias is not None:
                y = y + bias.index_select(0, rows)[:, None, None]
            if residual is not None:
                y = y + residual.index_select(1, rows)
            out[:, rows] = _ACTIVATION[spec.activation](y)
        if outgoing is not None:
            # The images that the scales are for, whatever the kernel's own are.
            pixels = out.numel() // max(1, out.shape[1] * outgoing.images)
            image = out.permute(0, 2, 3, 1).reshape(outgoing.images, pixels, 1, out.shape[1])
            self.pack.run(image.permute(0, 3, 1, 2), outgoing.messages)


class _ReferenceGrouped(PreparedConv2d):
    def __init__(self, descriptor: GroupedDescriptor) -> None:
        self.descriptor = descriptor

    @torch.no_grad()
    def run(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None = None,
        outgoing: Outgoing | None = None,
    ) -> None:
        assert outgoing is None, "grouped convolutions are prepared without messages"
        given, spec = self.descriptor, self.descriptor.spec
        shape = (given.out_channels, given.in_per_group, *spec.kernel_size)
        wanted = math.prod(shape)
        if packed_weight.numel() != wanted:
            raise ValueError(
                f"the packed weights hold {packed_weight.numel()} values, this layer has {wanted}: "
                "pack them again for this backend (prepack_grouped, or repack() of the module)"
            )
        y = _conv2d(sources[0], packed_weight.reshape(shape), spec, out, given.groups)
        if accumulate:
            y = y + out
        elif bias is not None:
            y = y + bias[:, None, None]
        if residual is not None:
            y = y + residual
        out.copy_(_ACTIVATION[spec.activation](y))


def _conv2d(x: Tensor, weight: Tensor, spec: ConvSpec, out: Tensor, groups: int = 1) -> Tensor:
    if x.shape[1] == 0:  # torch refuses a convolution over no channels; the sum is empty
        return out.new_zeros((out.shape[0], weight.shape[0], *out.shape[2:]))
    if x.shape[1] == 1:
        # torch 2.13 on the CPU computes wrong values for one channel in channels-last strides where
        # the output is one pixel wide; clone gives such a tensor its canonical strides.
        x = x.clone(memory_format=torch.contiguous_format)
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, groups)


def _conv2d_of_bytes(
    x: Tensor, weight: Tensor, spec: ConvSpec, given: InputBytes, out: Tensor
) -> Tensor:
    """In float64, which holds the whole numbers exactly."""
    weights, scale = weight_bytes(weight)
    sums = _conv2d(input_bytes(x, given), weights, spec, out.double())
    return (sums * (scale.double() * given.scale)[:, None, None]).to(out.dtype)


def _refuse_winograd(winograd: str) -> None:
    if winograd != "off":
        raise ValueError(
            f"backend 'reference' has no Winograd, asked for {winograd!r}; use winograd='off'"
        )


class _ReferenceGatherPack(PreparedGatherPack):
    def __init__(self, index: Sequence[Tensor]) -> None:
        self.index = list(index)

    @torch.no_grad()
    def run(self, x: Tensor, messages: Sequence[Tensor]) -> None:
        for channels, message in zip(self.index, messages, strict=True):
            selected = x.index_select(1, _checked(channels, x.shape[1]).to(x.device))
            values = selected.permute(0, 2, 3, 1)
            if message.dtype == torch.int8:
                write_int8(message, values)
            else:
                message.view(-1).copy_(values.reshape(-1))


class ReferenceBackend(Backend):
    name = "reference"

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else f"floating dtypes only, given {dtype}"

    def int8_refusal(self) -> str | None:
        return None

    def packed_numel(
        self,
        out_channels: int,
        segment_channels: Sequence[int],
        taps: int,
        dtype: torch.dtype,
        algorithm: str = "off",
    ) -> int:
        return out_channels * sum(segment_channels) * taps

    def prepack(
        self, weight: Tensor, segment_channels: Sequence[int], algorithm: str = "off"
    ) -> Tensor:
        _refuse_winograd("off" if algorithm == "int8" else algorithm)
        return weight.detach().reshape(-1).clone()

    def prepare(
        self,
        descriptor: Conv2dDescriptor,
        dtype: torch.dtype,
        pack: Sequence[Tensor] = (),
    ) -> PreparedConv2d:
        _refuse_winograd(descriptor.spec.winograd)
        return _ReferenceConv2d(descriptor, pack)

    def groups_as_nodes(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> bool:
        return False

    def grouped_numel(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> int:
        kernel = math.prod(descriptor.spec.kernel_size)
        return descriptor.out_channels * descriptor.in_per_group * kernel

    def prepack_grouped(self, weight: Tensor, descriptor: GroupedDescriptor) -> Tensor:
        return self.prepack(weight, (descriptor.in_per_group,), descriptor.spec.algorithm)

    def prepare_grouped(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> PreparedConv2d:
        return _ReferenceGrouped(descriptor)

    @torch.no_grad()
    def max_pool2d_(self, x: Tensor, window: ConvSpec, out: Tensor) -> None:
        out.copy_(
            F.max_pool2d(
                x, window.kernel_size, window.stride, window.padding, dilation=window.dilation
            )
        )

    def global_avg_pool2d_(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            out.copy_(x.mean((2, 3), keepdim=True))

        run()
        return run

    def prepare_gather_pack(self, index: Sequence[Tensor]) -> PreparedGatherPack:
        return _ReferenceGatherPack(index)


register(ReferenceBackend())
