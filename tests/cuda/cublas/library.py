"""A library with the functions of cuBLASLt for tensors in CPU memory."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from disco_kernels.cuda import cublas_lt

NOT_SUPPORTED, INTERNAL_ERROR = 15, 14  # statuses
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


def refuse(library: ctypes.CDLL, status: int) -> None:
    """What it answers from now on to every question for an algorithm and every product; 0 for an
    end to that."""
    ctypes.c_int.in_dll(library, "disco_refuses").value = status
