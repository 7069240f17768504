"""The prepared kernel of grouped and depthwise convolutions: as those in
`disco_kernels.prepared_kernel`, packed once, called past the dispatcher, for inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import channels_last, check_in_place, execute, refuse_derivatives
from disco_kernels.prepacking import Alternative, PackedKernel, Packing
from disco_kernels.registry import PreparedConv2d
from disco_kernels.spec import ConvSpec, GroupedDescriptor, Pair, grouped_descriptor
from disco_kernels.winograd import alternatives_of, multiplications_saved

# Winograd for groups that also have the kernel of narrow groups. AVX-512, one thread, 3x3, us by
# that kernel and by the choice on nodes: groups of 26 on 14x14 98 and 81, of 48 507 and 383; of 17
# on 28x28 253 and 169, of 24 376 and 203. Of 16 on 14x14 122 and 189.
_FEWEST_PER_GROUP = 17


class GroupedConv2d(PackedKernel):
    """A convolution whose group g reads the g-th run of input channels and nothing else.

    Depthwise is ``groups`` equal to the input channels. No channel crosses a group, so a rank that
    owns whole groups needs nothing of the others.

    Args:
        weight: ``[O, I / groups, kh, kw]``.
        groups: divides I and O.
        spec: geometry and activation. Winograd "auto" is "off" for depthwise and narrow groups.
        bias: ``[O]`` or None.
        image_size: (height, width) of the inputs to expect, as for `PartialConv2d`.
        backend: a name, or None for the automatic choice.
        packing: packs the weights together with those of other kernels, and reads them then; or
            None to pack now.

    Raises:
        ValueError: shapes that do not fit each other.
        BackendUnavailable: ``backend`` cannot serve this dtype and device.
    """

    def __init__(
        self,
        weight: Tensor,
        groups: int,
        spec: ConvSpec,
        *,
        bias: Tensor | None = None,
        image_size: Pair | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
    ) -> None:
        if weight.dim() != 4 or tuple(weight.shape[2:]) != spec.kernel_size:
            height, width = spec.kernel_size
            raise ValueError(
                f"weight must be [O, I / groups, {height}, {width}] for this kernel, given "
                f"{list(weight.shape)}"
            )
        if spec.input_bytes is not None:
            raise ValueError("grouped convolutions have no products of 8-bit integers")
        outputs, inputs = weight.shape[:2]
        descriptor = grouped_descriptor(spec, groups, groups * inputs, outputs)
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"bias must be [{outputs}] {weight.dtype} as the weight, given "
                f"{list(bias.shape)} {bias.dtype}"
            )
        self.backend = registry.resolve(backend, weight.device, weight.dtype)
        self.descriptor = descriptor
        self.dtype = weight.dtype
        self.image_size = image_size
        self._unpacked: Tensor | None = weight
        self.bias = None if bias is None else bias.detach().clone()
        self._pack_in(packing)

    @property
    def algorithm(self) -> str:
        return self.descriptor.spec.algorithm

    def _alternatives(self) -> list[Alternative]:
        descriptor, backend = self.descriptor, registry.get(self.backend)
        outputs, inputs = descriptor.out_per_group, descriptor.in_per_group
        allowed = alternatives_of(
            descriptor.spec, outputs, inputs, self.image_size, self.backend, self.dtype
        )
        wide = min(outputs, inputs) >= _FEWEST_PER_GROUP
        if descriptor.spec.winograd == "auto" and not wide:
            # Most groups as narrow as this have a kernel of their own.
            nodes = backend.groups_as_nodes(self._descriptor_with("off"), self.dtype)
            allowed = allowed if nodes else ("off",)
        pairs = descriptor.groups * outputs * inputs
        chosen_for = self.image_size if len(allowed) > 1 else None
        size = descriptor.spec.output_size(*chosen_for) if chosen_for else (0, 0)
        return [
            Alternative(
                winograd,
                backend.grouped_numel(self._descriptor_with(winograd), self.dtype)
                * self.dtype.itemsize,
                multiplications_saved(winograd, pairs, size[0] * size[1]),
            )
            for winograd in allowed
        ]

    def _descriptor_with(self, winograd: str) -> GroupedDescriptor:
        return replace(self.descriptor, spec=replace(self.descriptor.spec, winograd=winograd))

    def _pack(self, winograd: str) -> Tensor:
        assert self._unpacked is not None
        self.descriptor = self._descriptor_with(winograd)
        return registry.get(self.backend).prepack_grouped(self._unpacked, self.descriptor)

    def _prepare(self) -> PreparedConv2d:
        return registry.get(self.backend).prepare_grouped(self.descriptor, self.dtype)

    @property
    def out_channels(self) -> int:
        return self.descriptor.out_channels

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Run.

        Args:
            x: ``[B, I, H, W]``, any strides (a channel stride of 1 avoids a copy).
            residual: ``[B, O, OH, OW]`` or None, added before the activation.
            out: where to write, channel stride 1, or None for a fresh tensor.

        Returns:
            ``[B, O, OH, OW]`` in channels-last memory.
        """
        refuse_derivatives(type(self).__name__, x, residual, out)
        image = channels_last(x, "x")
        (wanted,) = self.descriptor.channels_needed
        if image.shape[1] != wanted:  # more would go unnoticed: the groups are runs of channels
            raise ValueError(f"x must have {wanted} channels, given {image.shape[1]}")
        return execute(
            self._prepared, self.descriptor, [image], self.packed_weight, self.bias, residual, out
        )

    def bind(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`."""
        self(x, residual, out)
        image = channels_last(x, "x")
        check_in_place("x", x, image)
        added = None if residual is None else channels_last(residual, "residual")
        return self._prepared.bind([image], self.packed_weight, self.bias, added, out)
