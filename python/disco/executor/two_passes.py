"""What a layer can compute before its payloads are there.

Its own channels are summed up while the payloads travel, and the payloads' channels once they have
arrived; where they are there already, all is computed in one pass, which need not read the output
again. Both give the same bits (`disco_kernels.two_passes`), so it is decided anew by every request.

One pass it stays in bfloat16, in 8-bit integers, with Winograd and on other backends than the C++
kernels, because a break would change the bits there; for the first request of a shape and for
operands that a kernel cannot read in place, which are not bound; and where a layer's first segment
is a payload. The residual of a layer in two passes keeps its memory, since the first pass writes
where the residual would be overwritten.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import disco_kernels as dk
from disco.executor.request import Request
from disco.executor.steps import REQUEST_SLOT, Step, Values

# Fewest products an output for which a first pass is worth it. The second one reads the output
# again, which takes as long as 5 to 16 products an output: ResNet-50's layers for two nodes at
# density 0.2 (AVX-512, one thread) take 1.16 times as long in two passes with 32 + 6 channels and
# 1.01 times with 512 + 102.
_FEWEST_PRODUCTS = 16


@dataclass(frozen=True)
class LocalPart:
    """The segments of a layer that are there before its payloads.

    Attributes:
        kernel: of the layer.
        num_first: segments that come first and are no payloads.
        payloads: slots of the other segments; they are payloads or were computed from some.
    """

    kernel: dk.PartialConv2d | dk.PartialLinear
    num_first: int
    payloads: tuple[int, ...]

    @property
    def in_two_passes(self) -> bool:
        """Whether the kernel, whose weights are packed by now, can be used so."""
        node = self.kernel.descriptor.nodes[0]
        channels = sum(node.segment_channels[: self.num_first])
        products = channels * prod(self.kernel.descriptor.spec.kernel_size)
        return self.kernel.sums_in_parts and products >= _FEWEST_PRODUCTS


def local_part(kernel: Any, slots: Sequence[int], payloads: Collection[int]) -> LocalPart | None:
    """What a layer over the segments in these slots can do early, or None."""
    num_first = next((i for i, slot in enumerate(slots) if slot in payloads), len(slots))
    if not isinstance(kernel, (dk.PartialConv2d, dk.PartialLinear)):
        return None
    late = tuple(slot for slot in slots[num_first:] if slot in payloads)
    return LocalPart(kernel, num_first, late) if num_first and late else None


def first_pass(step: Step, part: LocalPart, unused_slot: int) -> Step:
    """The step that goes before ``step``; its value is None.

    Args:
        step: computes the whole layer, or the rest of it where its slot is in `Request.begun`.
        part: what of it does not wait.
        unused_slot: where nothing is read.
    """
    target, payloads = step.out, part.payloads

    def run(values: Values) -> None:
        request: Request = values[REQUEST_SLOT]
        passes = request.activations.passes.get(target)
        if passes is None:
            return
        arriving = request.arriving
        for slot in payloads:
            if not arriving[slot].done:
                passes.first()
                request.begun.add(target)
                return

    return Step(f"{step.name}.local", run, unused_slot, progress=True)
