"""The launch of a depthwise convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import GroupedDescriptor
from disco_kernels.triton.arguments import geometry, pixel_strides, power_of_two, strides, wide
from disco_kernels.triton.depthwise import depthwise_kernel


class TritonDepthwise(PreparedConv2d):
    """Groups of one input channel."""

    def __init__(self, descriptor: GroupedDescriptor) -> None:
        self.descriptor = descriptor

    @property
    def last_kernel(self) -> str:
        return "triton"

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
        (x,), given = sources, self.descriptor
        wanted = given.out_channels * math.prod(given.spec.kernel_size)
        if packed_weight.numel() != wanted:
            raise ValueError(
                f"the packed weights hold {packed_weight.numel()} values, this layer has {wanted}: "
                "pack them again for this backend (prepack_grouped, or repack() of the module)"
            )
        batch, channels, height, width = out.shape
        pixels = batch * height * width
        if pixels == 0:
            return
        block_c = min(64, power_of_two(channels))
        block_m = 2048 // block_c
        depthwise_kernel[(-(-pixels // block_m), -(-channels // block_c))](
            x,
            strides(x),
            packed_weight,
            bias,
            residual,
            None if residual is None else pixel_strides(residual),
            out,
            pixel_strides(out),
            pixels,
            x.shape[2],
            x.shape[3],
            height,
            width,
            channels,
            PER_GROUP=given.out_per_group,
            **geometry(given.spec),
            WIDE=wide(x, out, residual),
            ACTIVATION=given.spec.activation,
            ACCUMULATE=accumulate,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=4,
        )
