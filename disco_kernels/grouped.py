"""The prepared kernel of grouped and depthwise convolutions: as those in `disco_kernels.kernels`,
packed once, called past the dispatcher, for inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import channels_last, execute
from disco_kernels.memory import Pool
from disco_kernels.registry import Backend
from disco_kernels.spec import ConvSpec, GroupedDescriptor, Pair, grouped_descriptor
from disco_kernels.winograd import resolve_winograd

# Winograd for groups that also have the kernel of narrow groups. AVX-512, one thread, 3x3, us by
# that kernel and by the choice on nodes: groups of 26 on 14x14 98 and 81, of 48 507 and 383; of 17
# on 28x28 253 and 169, of 24 376 and 203. Of 16 on 14x14 122 and 189.
_FEWEST_PER_GROUP = 17


class GroupedConv2d:
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
        pool: where to keep the packed weight, or None for memory of its own.

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
        pool: Pool | None = None,
    ) -> None:
        if weight.dim() != 4 or tuple(weight.shape[2:]) != spec.kernel_size:
            height, width = spec.kernel_size
            raise ValueError(
                f"weight must be [O, I / groups, {height}, {width}] for this kernel, given "
                f"{list(weight.shape)}"
            )
        outputs, inputs = weight.shape[:2]
        descriptor = grouped_descriptor(spec, groups, groups * inputs, outputs)
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"bias must be [{outputs}] {weight.dtype} as the weight, given "
                f"{list(bias.shape)} {bias.dtype}"
            )
        self.backend = registry.resolve(backend, weight.device, weight.dtype)
        chosen = registry.get(self.backend)
        self.descriptor = _resolve(descriptor, image_size, chosen, weight)
        packed = chosen.prepack_grouped(weight, self.descriptor)
        if pool is not None and packed.device.type == "cpu":
            packed = pool.empty(packed.numel(), packed.dtype).copy_(packed)
        self.packed_weight = packed
        self.bias = None if bias is None else bias.detach().clone()
        self._prepared = chosen.prepare_grouped(self.descriptor, packed.dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, the kernel's own header included."""
        return self.packed_weight.numel() * self.packed_weight.element_size()

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
        if image.data_ptr() != x.data_ptr():
            raise ValueError(
                f"x {list(x.shape)} with strides {x.stride()} cannot be bound: the kernel reads a "
                "copy of it; give it in channels-last memory"
            )
        added = None if residual is None else channels_last(residual, "residual")
        return self._prepared.bind([image], self.packed_weight, self.bias, added, out)

    # The backend's part holds addresses, so copies and pickles make their own.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_prepared"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        chosen = registry.get(self.backend)
        self._prepared = chosen.prepare_grouped(self.descriptor, self.packed_weight.dtype)


def _resolve(
    descriptor: GroupedDescriptor, image_size: Pair | None, backend: Backend, weight: Tensor
) -> GroupedDescriptor:
    """With Winograd "auto" replaced by a choice for groups of this width."""
    outputs, inputs = descriptor.out_per_group, descriptor.in_per_group
    resolved = resolve_winograd(
        descriptor.spec, outputs, inputs, image_size, backend.name, weight.dtype
    )
    if descriptor.spec.winograd == "auto" and resolved.winograd != "off":
        direct = replace(descriptor, spec=replace(resolved, winograd="off"))
        wide = min(outputs, inputs) >= _FEWEST_PER_GROUP
        if not wide and not backend.groups_as_nodes(direct, weight.dtype):
            return direct
    return replace(descriptor, spec=resolved)
