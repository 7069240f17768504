"""Float32 operands of products whose factors have 10 bits."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. Tensor cores drop the last 13 bits of a float32; dropped without rounding,
    they make every product smaller, and layer by layer more so."""
    if PRECISION == "tf32":
        a = _rounded(a)
        b = _rounded(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _rounded(x):
    """To the nearest of 10 bits, ties away from zero; infinities and NaN as they are."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)
