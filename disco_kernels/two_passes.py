"""A layer in two passes: what is there already is summed up while the rest is still on its way.

Both passes read the same packed weights, and the second continues the sums of the first in the
output itself, so the bits do not depend on whether there was a break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import Part


@dataclass(frozen=True)
class Passes:
    """Bound calls that compute the same output, bit for bit.

    Attributes:
        whole: everything at once.
        first: bias and the first segments. Until `second` has run the output holds raw sums.
        second: the other segments, then residual, activation and messages.
    """

    whole: Callable[[], None]
    first: Callable[[], None]
    second: Callable[[], None]


def bind_passes(
    prepared: PreparedConv2d,
    sources: Sequence[Tensor],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    num_first: int,
    outgoing: Outgoing | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> Passes:
    """Bind a call and both of its halves; ``num_first`` segments are the first one's.

    Raises:
        ValueError: a backend or algorithm that does not sum in parts; a residual in the memory of
            ``out``, which `Passes.first` would overwrite; no segments on one side.
    """
    if not prepared.sums_in_parts:
        raise ValueError(
            "this kernel computes all segments in one pass: only the C++ kernels' direct sums in "
            "float32 can be broken off without other bits; use bind"
        )
    if not 0 < num_first < len(sources):
        raise ValueError(
            f"two passes share out {len(sources)} segments: the first takes 1 to "
            f"{len(sources) - 1} of them, given {num_first}"
        )
    if residual is not None and _overlap(residual, out):
        raise ValueError(
            "the residual lies in the memory of out, where the first pass leaves its sums: give "
            "out memory of its own, or use one pass"
        )
    first, rest = Part(0, num_first), Part(num_first, None)
    return Passes(
        prepared.bind(sources, packed_weight, bias, residual, out, outgoing, scales),
        prepared.bind_part(sources, packed_weight, bias, None, out, first, None, scales),
        prepared.bind_part(sources, packed_weight, bias, residual, out, rest, outgoing, scales),
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    (begin_a, end_a), (begin_b, end_b) = _extent(a), _extent(b)
    return begin_a < end_b and begin_b < end_a


def _extent(x: Tensor) -> tuple[int, int]:
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + span * x.element_size()
