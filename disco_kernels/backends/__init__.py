"""The backends; importing them registers them."""

from disco_kernels.backends import cpu, reference, triton

__all__ = ["cpu", "reference", "triton"]
