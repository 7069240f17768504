"""Winograd F(m x m, 3 x 3) written as matrices, and how far float32 may take it from the truth.

An output tile is ``A' [sum over channels of (G g G') * (B' d B)] A``, with ``g`` the kernel and
``d`` the tile's pixels (Lavin and Gray, arXiv 1509.09308). The matrices are those of
csrc/cpu/winograd_body.h and pack.cpp; `test_winograd` proves that they compute a convolution.

Derivation of the bound (Higham, as in `oracle`). Every step is a sum of products, so each term
``A G g B d`` of the expanded sum goes through a number of roundings of relative size at most
``u``; no step uses a variable twice, so the absolute values of the terms are those of the expanded
matrices. The constants are exact. Without fused multiply-add there are at most

* 4 roundings in a line of the input transform (two products, two sums): 8 in two dimensions,
* 1 of the weight, transformed in float64,
* K + 1 of the sum over K channels,
* 6 in a line of the output transform (a difference, two products twice, two sums): 12,
* 3 for bias, residual and what was there before; 3 to spare.

So ``|computed - exact| <= gamma_m * |A'| [sum |G g G'| * (|B'| |d| |B|)] |A|`` with m = K + 28.
Against direct convolution's ``9 K + 4`` roundings the number is smaller and the sum larger: as
measured, F(2x2) has 0.7 and F(4x4) 2.1 times direct convolution's error (root mean squares).

For bfloat16, F(2x2) multiplies in bfloat16: ``G g G'`` and ``B' d B`` are each rounded once more,
by at most 2**-8 of themselves, before they meet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from disco_kernels import ConvSpec

A, B = 0.625, 1.5  # the points of F(4x4), beside 0 and infinity
SIZES = {"f2": 2, "f4": 4}
# A weight taken for zero, or a product that underflows, is at most multiplied by the largest sums
# of a row of B' (5.3 for F(4x4)) and of A' (8.3), in two dimensions, at 36 points.
GROWTH = 36 * (5.3 * 8.3) ** 2


def roundings(channels: int) -> int:
    return channels + 28


def operand_rounding(winograd: str, dtype: torch.dtype) -> float:
    """What part of a product its two factors' rounding to bfloat16 may change."""
    return (1 + 2.0**-8) ** 2 - 1 if (winograd, dtype) == ("f2", torch.bfloat16) else 0.0


def matrices(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """``B'`` [m + 2, m + 2], ``G`` [m + 2, 3] and ``A'`` [m, m + 2], float64."""
    if m == 2:
        b = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
        g = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
        a = [[1, 1, 1, 0], [0, 1, -1, 1]]
    else:
        a2, b2 = A * A, B * B
        b = [
            [a2 * b2, 0, -(a2 + b2), 0, 1, 0],
            [0, -A * b2, -b2, A, 1, 0],
            [0, A * b2, -b2, -A, 1, 0],
            [0, -B * a2, -a2, B, 1, 0],
            [0, B * a2, -a2, -B, 1, 0],
            [0, a2 * b2, 0, -(a2 + b2), 0, 1],
        ]
        near, far = 2 * a2 * (a2 - b2), 2 * b2 * (b2 - a2)
        g = [
            [1 / (a2 * b2), 0, 0],
            *([1 / near, x / near, x * x / near] for x in (A, -A)),
            *([1 / far, x / far, x * x / far] for x in (B, -B)),
            [0, 0, 1],
        ]
        a = [[1, 1, 1, 1, 1, 0], [0, A, -A, B, -B, 0], [0, a2, a2, b2, b2, 0]]
        a.append([0, A**3, -(A**3), B**3, -(B**3), 1])
    f64 = torch.float64
    return torch.tensor(b, dtype=f64), torch.tensor(g, dtype=f64), torch.tensor(a, dtype=f64)


def scale(x: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    """``|A'| [sum |G g G'| * (|B'| |d| |B|)] |A|`` of ``[B, K, H, W]`` and ``[O, K, 3, 3]``."""
    m = SIZES[spec.winograd]
    height, width = spec.output_size(x.shape[2], x.shape[3])
    tiles_h, tiles_w = -(-height // m), -(-width // m)
    result = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=torch.float64)
    if 0 in (x.shape[0], x.shape[1]):
        return result
    (ph, pw), (h, w) = spec.padding, x.shape[2:]
    right, below = tiles_w * m + 2 - pw - w, tiles_h * m + 2 - ph - h
    tiles = F.pad(x.abs(), (pw, right, ph, below)).unfold(2, m + 2, m).unfold(3, m + 2, m)
    b, g, a = matrices(m)
    pixels = b.abs() @ tiles @ b.abs().t()
    points = (g @ weight @ g.t()).abs()
    sums = torch.einsum("ocij,ncxyij->noxyij", points, pixels)
    outputs = a.abs() @ sums @ a.abs().t()
    whole = outputs.permute(0, 1, 2, 4, 3, 5).reshape(*result.shape[:2], tiles_h * m, tiles_w * m)
    return whole[:, :, :height, :width]
