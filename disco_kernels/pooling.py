"""Prepared pooling in channels-last memory, past the dispatcher, for inference."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import channels_last, check_in_place, empty_output, refuse_derivatives
from disco_kernels.spec import ConvSpec


class MaxPool2d:
    """Max pooling in channels-last memory, as ``torch.nn.functional.max_pool2d`` computes it.

    Args:
        window: kernel, stride, padding (at most half of the kernel) and dilation.
        backend: a name, or None for the automatic choice (made at each call's dtype and device).
    """

    def __init__(self, window: ConvSpec, backend: str | None = None) -> None:
        kernel, padding = window.kernel_size, window.padding
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise ValueError(f"padding {padding} must be at most half of the kernel {kernel}")
        self.window = window
        self.backend = backend

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, OH, OW]`` in channels-last memory, ``out`` if given."""
        refuse_derivatives(type(self).__name__, x, out)
        x = channels_last(x, "x")
        shape = (*x.shape[:2], *self.window.output_size(x.shape[2], x.shape[3]))
        if out is None:
            out = empty_output(x, shape[1], shape[2], shape[3], x.dtype)
        if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"out must be {list(shape)} {x.dtype} on {x.device}, given {list(out.shape)} "
                f"{out.dtype} on {out.device}"
            )
        if channels_last(out, "out") is not out:
            raise ValueError(f"out must have a channel stride of 1, given {out.stride()}")
        backend = registry.get(registry.resolve(self.backend, x.device, x.dtype))
        backend.max_pool2d_(x, self.window, out)
        return out


class GlobalAvgPool2d:
    """The mean of every channel over the whole map, without leaving channels-last.

    ``torch.nn.functional.adaptive_avg_pool2d(x, 1)``, its sums in float32.

    Args:
        backend: a name, or None for the automatic choice (made at each call's dtype and device).
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, 1, 1]`` in channels-last memory, ``out`` if given.

        Raises ValueError for a map without pixels and for an ``out`` that does not fit.
        """
        refuse_derivatives(type(self).__name__, x, out)
        return self._run(channels_last(x, "x"), out)[0]

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`."""
        source = channels_last(x, "x")
        check_in_place("x", x, source)
        return self._run(source, out)[1]

    def _run(self, x: Tensor, out: Tensor | None) -> tuple[Tensor, Callable[[], None]]:
        if min(x.shape[2:]) < 1:
            raise ValueError(f"x must have at least one pixel, given {list(x.shape)}")
        shape = (*x.shape[:2], 1, 1)
        if out is None:
            out = empty_output(x, x.shape[1], 1, 1, x.dtype)
        if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"out must be {list(shape)} {x.dtype} on {x.device}, given {list(out.shape)} "
                f"{out.dtype} on {out.device}"
            )
        if channels_last(out, "out") is not out:
            raise ValueError(f"out must have a channel stride of 1, given {out.stride()}")
        backend = registry.get(registry.resolve(self.backend, x.device, x.dtype))
        return out, backend.global_avg_pool2d_(x, out)
