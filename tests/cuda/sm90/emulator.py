"""The convolution for Hopper's tensor cores, compiled for the CPU: what the extension's class
`Conv2dSm90` is, for tensors in CPU memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
# Sums in any order, but not -ffast-math: a library linked with it has the process flush denormals.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"),
)

NodeArgs = tuple[list[tuple[int, int, int]], int, int, int, int]


def compile_emulation(folder: Path) -> ctypes.CDLL:
    """The device code and its launch, with this folder's headers for CUDA's."""
    copies = folder / "cuda"
    copies.mkdir()
    for name in ("conv2d_sm90.cu", "conv2d_sm90.cuh", "conv2d_sm90.h", "sm90_layout.cuh"):
        shutil.copy(ROOT / "csrc" / "cuda" / name, copies)
    shutil.copy(HERE / "sm90.cuh", copies)
    library = folder / "libdisco_sm90.so"
    source = HERE / "emulation.cpp"
    includes = (f"-I{folder}", f"-I{HERE}")
    command = ["g++", *_FLAGS, *includes, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("why_not", "why_not_width", "tiles", "run"):
        getattr(loaded, f"disco_{name}").restype = ctypes.c_char_p
    return loaded


def kernel_class(library: ctypes.CDLL) -> Any:
    """A class with the methods of the extension's."""

    def ints(values: Sequence[int]) -> Any:
        return (ctypes.c_int * len(values))(*values)

    def longs(values: Sequence[int]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    def flat(nodes: Sequence[NodeArgs]) -> Any:
        words: list[int] = []
        for runs, columns, out_begin, inputs, weight_begin in nodes:
            words += [len(runs), columns, out_begin, inputs, weight_begin]
            words += [word for run in runs for word in run]
        return ints(words)

    class EmulatedConv2d:
        seed = 1  # of the order in which copies arrive

        def __init__(
            self, nodes: Sequence[NodeArgs], window: Sequence[int], bfloat16: bool
        ) -> None:
            self._layer = (flat(nodes), len(nodes), ints(window))
            self._bfloat16 = bfloat16

        @staticmethod
        def why_not(nodes: Sequence[NodeArgs], window: Sequence[int]) -> str:
            return _text(library.disco_why_not(flat(nodes), len(nodes), ints(window)))

        def why_not_width(self, width: int, one_row: bool, tile: int) -> str:
            return _text(
                library.disco_why_not_width(*self._layer, width, ctypes.c_bool(one_row), tile)
            )

        @staticmethod
        def tiles() -> list[str]:
            return _text(library.disco_tiles()).split()

        def run(
            self,
            x: Sequence[int],
            n_h_w: Sequence[int],
            weight: int,
            bias: int,
            residual: Sequence[int],
            out: Sequence[int],
            activation: int,
            stream: int,
            tile: int,
        ) -> None:
            said = _text(
                library.disco_run(
                    *self._layer,
                    ctypes.c_bool(self._bfloat16),
                    longs(x),
                    ints(n_h_w),
                    ctypes.c_int64(weight),
                    ctypes.c_int64(bias),
                    longs(residual),
                    longs(out),
                    activation,
                    tile,
                    ctypes.c_uint(self.seed),
                )
            )
            if said.startswith("value: "):
                raise ValueError(said.removeprefix("value: "))
            assert not said, said

    return EmulatedConv2d


def _text(said: bytes) -> str:
    return said.decode()
