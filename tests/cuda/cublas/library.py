"""A library with the functions of cuBLASLt for tensors in CPU memory."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from disco_kernels.cuda import cublas_lt

_FLAGS = (
    *("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
)


def compile_library(folder: Path) -> ctypes.CDLL:
    """With `disco_live_objects`, and `count` and `refuse` for what it has done and shall do."""
    source, library = Path(__file__).with_name("cublas_lt.cpp"), folder / "libcublasLt.so"
    command = ["g++", *_FLAGS, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return cublas_lt.declared(ctypes.CDLL(str(library)))


def products(library: ctypes.CDLL) -> int:
    """How many it has computed."""
    return ctypes.c_int.in_dll(library, "disco_products").value


def refuse(library: ctypes.CDLL, refuses: bool) -> None:
    """Whether it has no algorithm for any product."""
    ctypes.c_int.in_dll(library, "disco_refuses").value = int(refuses)
