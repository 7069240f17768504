"""What is used of NVIDIA's cuBLASLt, which torch brings: one product with what follows it.

Declared as in cublasLt.h, whose values are the same in CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import (
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disco_kernels.cuda import device as devices

_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType_t
_FLOAT32 = 0
_COMPUTE_32F = 68
_EPILOGUE, _BIAS_POINTER = 7, 8  # attributes of a product
_MOST_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # attributes of a preference
_IN_FLOAT32 = (
    2  # of the reductions: parts of a sum are not rounded to 16 bits before they are added
)
_ALIGNED = 16  # bytes; less than torch's memory is, so that the algorithm is the same everywhere
_PLAIN, _RELU, _BIAS = 1, 2, 4  # epilogues; those of both are their sum
_WORKSPACE_BYTES = 32 << 20  # NVIDIA's advice for Hopper
_NOT_SUPPORTED = 15


class _Algorithm(Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Found(Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "Create": (c_void_p,),
    "Destroy": (c_void_p,),
    "MatmulDescCreate": (c_void_p, c_int, c_int),
    "MatmulDescDestroy": (c_void_p,),
    "MatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "MatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "MatrixLayoutDestroy": (c_void_p,),
    "MatmulPreferenceCreate": (c_void_p,),
    "MatmulPreferenceDestroy": (c_void_p,),
    "MatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "MatmulAlgoGetHeuristic": (*(c_void_p,) * 7, c_int, c_void_p, c_void_p),
    "Matmul": (*(c_void_p,) * 14, c_size_t, c_void_p),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The one that torch has loaded, or None."""
    if torch.version.cuda is None:
        return None
    try:
        return declared(ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"))
    except (OSError, AttributeError):
        return None


def declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """With the functions' arguments. AttributeError if it lacks one."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"cublasLt{name}")
        function.argtypes, function.restype = arguments, c_int
    found.cublasLtGetStatusString.argtypes = (c_int,)
    found.cublasLtGetStatusString.restype = c_char_p
    return found


class _Object:
    """One of the library's, until nothing refers to it. RuntimeError if it cannot be made."""

    def __init__(self, lib: ctypes.CDLL, kind: str, *arguments: int) -> None:
        self.pointer = c_void_p()
        _call(lib, f"{kind}Create", byref(self.pointer), *arguments)
        destroy = getattr(lib, f"cublasLt{kind}Destroy")
        # Not when Python ends: the device may be gone by then.
        weakref.finalize(self, destroy, self.pointer).atexit = False

    def set(self, lib: ctypes.CDLL, kind: str, attribute: int, value: Any) -> None:
        size = ctypes.sizeof(value)
        _call(lib, f"{kind}SetAttribute", self.pointer, attribute, byref(value), size)


class Product(NamedTuple):
    """``out[m, n] = activation(x[m, k] weight[k, n] + bias[n] + residual[m, n])``, row by row.

    Attributes:
        m, n, k: as above.
        x_stride, weight_stride, out_stride: elements from one row to the next.
        residual_stride: likewise, 0 for none.
        bias: address, 0 for none.
        relu: otherwise there is no activation.
        dtype: of all, torch.bfloat16 or torch.float16; sums are float32.
    """

    m: int
    n: int
    k: int
    x_stride: int
    weight_stride: int
    out_stride: int
    residual_stride: int
    bias: int
    relu: bool
    dtype: torch.dtype


class Plan:
    """A product with the algorithm that the library recommends.

    Attributes:
        possible: whether it has one.

    Raises:
        RuntimeError: in the library's words, if it cannot answer, as while a graph is captured.
    """

    def __init__(self, product: Product, device: torch.device) -> None:
        with devices.current(device):
            self._make(product, _handle(device))

    def _make(self, product: Product, handle: _Object) -> None:
        lib = _loaded()
        self._lib, self._handle = lib, handle
        self._matmul = _Object(lib, "MatmulDesc", _COMPUTE_32F, _FLOAT32)
        epilogue = (_RELU if product.relu else 0) + (_BIAS if product.bias else 0)
        self._matmul.set(lib, "MatmulDesc", _EPILOGUE, c_int(epilogue or _PLAIN))
        if product.bias:
            self._matmul.set(lib, "MatmulDesc", _BIAS_POINTER, c_void_p(product.bias))
        # The library counts along columns first: to it these are the matrices' transposes.
        dtype, m, n, k = _TYPES[product.dtype], product.m, product.n, product.k
        self._weight = _Object(lib, "MatrixLayout", dtype, n, k, product.weight_stride)
        self._x = _Object(lib, "MatrixLayout", dtype, k, m, product.x_stride)
        self._out = _Object(lib, "MatrixLayout", dtype, n, m, product.out_stride)
        # A residual in the output's memory has to be described by the very same object.
        self._residual = self._out
        if product.residual_stride not in (0, product.out_stride):
            self._residual = _Object(lib, "MatrixLayout", dtype, n, m, product.residual_stride)
        self._beta = c_float(1.0 if product.residual_stride else 0.0)
        wanted = _Object(lib, "MatmulPreference")
        wanted.set(lib, "MatmulPreference", _MOST_WORKSPACE, c_size_t(_WORKSPACE_BYTES))
        wanted.set(lib, "MatmulPreference", _REDUCTIONS, c_uint32(_IN_FLOAT32))
        for attribute in _ALIGNMENTS:
            wanted.set(lib, "MatmulPreference", attribute, c_uint32(_ALIGNED))
        found, count = _Found(), c_int()
        layouts = (self._weight, self._x, self._residual, self._out)
        status = lib.cublasLtMatmulAlgoGetHeuristic(
            handle.pointer,
            self._matmul.pointer,
            *(layout.pointer for layout in layouts),
            wanted.pointer,
            1,
            byref(found),
            byref(count),
        )
        if status != _NOT_SUPPORTED:
            _check(lib, "MatmulAlgoGetHeuristic", status)
        self.possible = status == 0 and count.value > 0 and found.state == 0
        self._algorithm, self._workspace_bytes = found.algorithm, found.workspace_bytes

    def run(self, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """On the current stream. RuntimeError, in the library's words, if it cannot be started."""
        with devices.current(x.device):
            self._start(x, weight, residual, out)

    def _start(self, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
        workspace = None
        if self._workspace_bytes:
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=x.device)
        _call(
            self._lib,
            "Matmul",
            self._handle.pointer,
            self._matmul.pointer,
            byref(c_float(1.0)),
            weight.data_ptr(),
            self._weight.pointer,
            x.data_ptr(),
            self._x.pointer,
            byref(self._beta),
            (out if residual is None else residual).data_ptr(),
            self._residual.pointer,
            out.data_ptr(),
            self._out.pointer,
            byref(self._algorithm),
            None if workspace is None else workspace.data_ptr(),
            self._workspace_bytes,
            devices.stream_of(x.device),
        )


@cache
def _handle(device: torch.device) -> _Object:
    return _Object(_loaded(), "")


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked for before"
    return found


def _call(lib: ctypes.CDLL, name: str, *arguments: Any) -> None:
    _check(lib, name, getattr(lib, f"cublasLt{name}")(*arguments))


def _check(lib: ctypes.CDLL, name: str, status: int) -> None:
    if status != 0:
        said = lib.cublasLtGetStatusString(status)
        raise RuntimeError(f"cublasLt{name}: {said.decode() if said else status}")
