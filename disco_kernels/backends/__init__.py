"""The backends; importing them registers them."""

from disco_kernels.backends import cpu, cuda, reference, triton

__all__ = ["cpu", "cuda", "reference", "triton"]
