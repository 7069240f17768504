"""The oracle of the kernel tests: convolutions in float64 with an elementwise error bound.

Derivation of the bound (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sec. 3.1
and 4.2). An output is a sum of ``n = K * taps`` products, a bias, a residual and, where a second
pass adds onto a first, one more partial sum. Computed in float32 in **any** order, with or without
fused multiply-add, every term goes through at most ``m = n + 4`` roundings, each of relative size
at most ``u = 2**-24``. So with ``gamma_m = m * u / (1 - m * u)``

    |computed - exact|  <=  gamma_m * (sum |w| * |x|  +  |bias|  +  |residual|)

and the sum on the right is the same convolution over absolute values. ReLU does not enlarge a
difference; other activations enlarge it by at most their steepest slope and add an error of their
own (`activations.bound`). What float32 cannot hold normally comes on top: kernels may take a weight
below ``FLT_MIN`` for zero (csrc/cpu/conv2d.h), and a product may underflow, together at most
``FLT_MIN * (n * max|x| + n)``. The inputs are float32, so their float64 copies are exact, and
float64's own error is 2**-29 of the bound.

Winograd sums other products: `winograd_model` derives what takes the place of the sum and of m.
Bfloat16 products are exact in float32 and so bounded alike; `rounded` adds the result's rounding.
Where Winograd multiplies in bfloat16, `winograd_model` says what its operands' rounding adds.

Sums of 8-bit integers are exact. With ``x = (q - z) s`` and ``w = b t`` of whole numbers q, z and
b, what is computed is the sum of ``q b`` times ``s t``, plus the bias less ``z s t`` times the sum
of b: every term is rounded at most 6 times, with the sum, with ``s t``, with the bias and its
correction, in their fused multiply-add, and with residual and what was there before. The terms are
those above and ``2 |z s w|`` of every weight, in the map or not.

The shape lists at the end serve the benchmarks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disco_kernels import ConvSpec, InputBytes, Ownership
from disco_kernels.pattern import Selected
from tests.kernels import activations, winograd_model
from tests.kernels.activations import UNIT_ROUNDOFF

FLT_MIN = 2.0**-126


@dataclass(frozen=True)
class Expected:
    """An exact result and how far float32 may be from it, both float64 and elementwise."""

    value: Tensor
    bound: Tensor


def conv2d(
    x: Tensor,
    weight: Tensor,
    spec: ConvSpec,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    before: Tensor | None = None,
    groups: int = 1,
) -> Expected:
    """``act(conv(x, weight) + bias + residual + before)`` of ``[B, K, H, W]``, ``[O, K, kh, kw]``.

    K may be 0: the sum is then empty. With groups ``x`` is ``[B, groups * K, H, W]``. The bound is
    that of the algorithm in ``spec.winograd``; with ``spec.input_bytes`` the exact result is that
    of the whole numbers which x and weight become.
    """
    dtype = x.dtype
    corrections = torch.zeros((), dtype=torch.float64)
    if spec.input_bytes is not None:
        x = in_steps(x, spec.input_bytes) * spec.input_bytes.scale
        weight = in_weight_steps(weight)
        off = 2 * spec.input_bytes.zero_point * spec.input_bytes.scale
        corrections = off * weight.abs().sum((1, 2, 3))[:, None, None]
    x, weight = x.double(), weight.double()
    value = _sums(x, weight, spec, groups)
    winograd = spec.winograd in ("f2", "f4")
    operands = torch.zeros(())
    if winograd:
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
        scale = torch.cat([winograd_model.scale(part, w, spec) for part, w in parts], 1)
        operands = winograd_model.operand_rounding(spec.winograd, dtype) * scale
    else:
        scale = _sums(x.abs(), weight.abs(), spec, groups) + corrections
    if bias is not None:
        value = value + bias.double()[:, None, None]
        scale = scale + bias.double().abs()[:, None, None]
    for added in (residual, before):
        if added is not None:
            value = value + added.double()
            scale = scale + added.double().abs()
    terms = weight.shape[1] * weight.shape[2] * weight.shape[3]
    most = winograd_model.roundings(weight.shape[1]) if winograd else terms + 4
    if spec.input_bytes is not None:
        most = 6
    roundings = most * UNIT_ROUNDOFF
    finite = x[x.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    underflow = FLT_MIN * (terms * largest + terms)
    if winograd:
        underflow *= winograd_model.GROWTH
    bound = roundings / (1 - roundings) * scale + underflow
    bound = bound + 1.01 * operands  # whose products are summed with the same roundings
    return Expected(
        activations.exact(value, spec.activation),
        activations.bound(value, bound, spec.activation),
    )


def in_steps(x: Tensor, given: InputBytes) -> Tensor:
    """Whole numbers of `InputBytes.scale` in float64; x meets the inverse in float32."""
    inverse = 1 / torch.tensor(given.scale, dtype=torch.float32)
    byte = torch.round(x.float() * inverse).double() + given.zero_point
    byte = torch.where(byte.isnan(), torch.zeros_like(byte), byte)
    return byte.clamp(0, 255) - given.zero_point


def in_weight_steps(weight: Tensor) -> Tensor:
    """``[O, ...]`` in float64: the multiples of 1/127 of a row's largest weight next to it."""
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for row, made in zip(weight.float(), exact, strict=True):
        if row.numel():
            step = torch.maximum(row.abs().max() / 127, torch.tensor(FLT_MIN))
            made.copy_(torch.round(row / step).double() * step.double())
    return exact


def rounded(expected: Expected, dtype: torch.dtype) -> Expected:
    """The same result written in ``dtype``: for bfloat16 one more rounding, of 2**-8 at most, and
    what is below ``FLT_MIN`` may become zero."""
    if dtype == torch.float32:
        return expected
    assert dtype == torch.bfloat16
    value, bound = expected.value, expected.bound
    return Expected(value, bound + 2.0**-8 * (value.abs() + bound) + FLT_MIN)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Expected:
    """`conv2d` over tokens: ``[..., K]`` and ``[O, K]`` -> ``[..., O]``."""
    rows = x.reshape(x[..., :1].numel() if x.shape[-1] else _count(x), x.shape[-1])
    added = None
    if residual is not None:
        added = residual.reshape(rows.shape[0], weight.shape[0])[:, :, None, None]
    image = conv2d(
        rows[:, :, None, None],
        weight[:, :, None, None],
        ConvSpec(activation=activation),
        bias,
        added,
    )
    shape = (*x.shape[:-1], weight.shape[0])
    return Expected(image.value.reshape(shape), image.bound.reshape(shape))


def concatenated(segments: Sequence[Tensor], index: Sequence[Tensor | None], dim: int) -> Tensor:
    """What a partial operator reads: the (indexed) channels of every segment, one after another."""
    parts = [
        x if listed is None else x.index_select(dim, listed.long())
        for x, listed in zip(segments, index, strict=True)
    ]
    return torch.cat(parts, dim)


def on_pattern(
    weight: Tensor, out_ownership: Ownership, in_ownership: Ownership, selected: Selected
) -> Tensor:
    """Boolean ``[O, I]``: which weights a gather operator reads."""
    mask = torch.zeros(weight.shape[:2], dtype=torch.bool)
    for rank, outputs in enumerate(out_ownership.channels):
        read = [*in_ownership.channels[rank], *(c for row in selected[rank] for c in row)]
        for channel in outputs:
            mask[channel, read] = True
    return mask


def check(actual: Tensor, expected: Expected, what: object = "") -> None:
    """Fail unless ``actual`` has the shape of ``expected`` and is within its bound everywhere.

    NaN in ``actual`` fails unless the exact value is NaN too; infinities must be equal.
    """
    assert actual.shape == expected.value.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.value.shape)}"
    )
    exact, got = expected.value, actual.double()
    finite = exact.isfinite()
    error = torch.where(finite, (got - exact).abs(), 0.0)
    same = torch.where(
        finite, error <= expected.bound, (got == exact) | (got.isnan() & exact.isnan())
    )
    if not bool(same.all()):
        wrong = (~same).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {same.numel()} values are wrong, the first at {first}: "
            f"{float(got[first])!r}, exact {float(exact[first])!r}, "
            f"allowed difference {float(expected.bound[first]):.3g}"
        )


def _sums(x: Tensor, weight: Tensor, spec: ConvSpec, groups: int) -> Tensor:
    size = spec.output_size(x.shape[2], x.shape[3])
    if 0 in (x.shape[0], x.shape[1]):
        return torch.zeros((x.shape[0], weight.shape[0], *size), dtype=torch.float64)
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, groups)


def _count(x: Tensor) -> int:
    return torch.Size(x.shape[:-1]).numel()


# Every remainder of the panels (8, 16 and 32 channels) and vectors (4, 8 and 16 lanes).
ALL_OUT_CHANNELS = tuple(range(1, 131))
ALL_IN_CHANNELS = tuple(range(0, 41))
ALL_MAPS = tuple(range(1, 16))
# One of each kind of remainder, for covering arrays.
SOME_OUT_CHANNELS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 64, 65, 97, 130)
SOME_IN_CHANNELS = (0, 1, 2, 3, 7, 16, 33, 40)
# (kernel, stride, padding, dilation) of one dimension; paddings beyond the kernel's reach included.
GEOMETRIES = (
    (1, 1, 0, 1),
    (1, 2, 0, 1),
    (1, 1, 1, 1),
    (1, 3, 2, 1),
    (2, 1, 0, 1),
    (2, 2, 1, 2),
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 1, 0, 1),
    (3, 1, 2, 2),
    (3, 3, 5, 1),
    (3, 2, 0, 3),
    (4, 1, 3, 1),
    (5, 1, 2, 1),
    (5, 2, 7, 2),
    (7, 2, 3, 1),
)
# Convolutions of ResNet-50: (in channels, out channels, kernel, stride, input map).
RESNET50_CONVOLUTIONS = (
    (3, 64, 7, 2, 224),
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (256, 128, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 512, 1, 1, 28),
    (256, 512, 1, 2, 56),
    (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (512, 256, 1, 1, 28),
    (256, 256, 3, 2, 28),
    (256, 1024, 1, 1, 14),
    (512, 1024, 1, 2, 28),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (1024, 512, 1, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (1024, 2048, 1, 2, 14),
    (2048, 512, 1, 1, 7),
    (512, 512, 3, 1, 7),
)
# Linears of DeiT-small at 197 tokens: (in features, out features).
DEIT_SMALL_LINEARS = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
