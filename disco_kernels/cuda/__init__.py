"""CUDA C++ kernels: those built into the extension or, without such, compiled by CuPy at first use.

The device code is csrc/cuda/*.cuh. Nothing here initialises CUDA or imports CuPy before a tensor on
a GPU comes (`disco_kernels.backends.cuda`).
"""
