"""The activations of `disco_kernels.ACTIVATIONS` on float32 values. NaN stays NaN."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low: tl.constexpr, high: tl.constexpr):
    # Comparisons with NaN are false, so it passes through; tl.clamp would need its own flag.
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = clamp(x, 0.0, 6.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is sigmoid(2 u), here with u = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "hardswish":
        x = x * clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "hardsigmoid":
        x = clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x
