"""Triton kernels: NVIDIA GPUs of compute capability 8.0 and newer, or Triton's own interpreter.

Nothing here is imported before the backend is first used (`disco_kernels.backends.triton`).
"""
