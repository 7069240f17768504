"""Compiles the convolution kernel for a GPU that is not there, and reads off what came of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from disco_kernels.triton.conv2d import conv2d_kernel
from disco_kernels.triton.tiles import Tile

_ALIGNED = [["tt.divisibility", 16]]
_NODE_WORDS = 11  # of a node with two parts: a run and a list


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs of a multiprocessor, and which instructions it has."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    wide_async_copies: int


def compile_conv2d(
    tile: Tile, capability: int, *, inside: bool, evenly: bool = True, dtype: str = "bf16"
) -> Compiled:
    """The launch of a layer whose lists are in groups of 16 bytes, with residual and ReLU.

    Args:
        capability: 80 or 90.
        inside: a 1 x 1 window, else any.
        evenly: nodes of equal size, else such as their table says.
    """
    names = list(conv2d_kernel.arg_names)
    pointer, strides = f"*{dtype}", ("i32", "constexpr", "i32", "i32")
    vector = 4 if dtype == "fp32" else 8
    signature: dict[str, Any] = dict.fromkeys(names, "i32")
    signature.update(dict.fromkeys(("weight", "bias", "residual", "out"), pointer))
    tables = ("tiles", "nodes", "channels", "out_channels")
    signature.update(dict.fromkeys(tables, "*i32"))
    signature.update(
        xs=(pointer,) * 2,
        x_strides=(strides,) * 2,
        scales=("constexpr",) * 2,
        scale_strides=("i32",) * 2,
        images_per_scale=("i32",) * 2,
        residual_strides=("i32",) * 3,
        out_strides=("i32",) * 3,
        messages=(),
        message_channels=(),
        positions="constexpr",
        record_base=("i32",) * _NODE_WORDS if evenly else "constexpr",
        record_step=("i32",) * _NODE_WORDS if evenly else "constexpr",
    )
    constants: dict[tuple[int, ...], Any] = {(names.index("positions"),): None}
    if not evenly:
        constants[(names.index("record_base"),)] = constants[(names.index("record_step"),)] = None
    for part in range(2):
        constants[(names.index("x_strides"), part, 1)] = 1
        constants[(names.index("scales"), part)] = None
    for name, value in {
        "NUM_PARTS": 2,
        "RUNS": (True, False),
        "NODE_WORDS": _NODE_WORDS,
        "NUM_MESSAGES": 0,
        "INSIDE": inside,
        "GROUP": vector,
        "OUT_RUNS": True,
        "OUT_GROUP": vector,
        "WIDE": False,
        "ACTIVATION": "relu",
        "ACCUMULATE": False,
        "PRECISION": "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "BLOCK_G": tile.g,
    }.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    # As the launcher finds them: multiples of 16 elements and bytes.
    attributes: dict[tuple[int, ...], Any] = {
        (names.index(name),): _ALIGNED for name in ("weight", "bias", "residual", "out", *tables)
    }
    for part in range(2):
        attributes[(names.index("xs"), part)] = _ALIGNED
        for dim in (0, 2, 3):
            attributes[(names.index("x_strides"), part, dim)] = _ALIGNED
    for name in ("residual_strides", "out_strides"):
        for dim in range(3):
            attributes[(names.index(name), dim)] = _ALIGNED
    built = triton.compile(
        ASTSource(conv2d_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return _read(built)


def _read(built: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    folder = Path(built.metadata_group[next(iter(built.metadata_group))]).parent
    cubin = next(folder.glob("*.cubin"))
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    ptx = built.asm["ptx"]
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        wide_async_copies=len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10", ptx)),
    )
