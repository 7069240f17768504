"""Run the emulated kernels on buffers that end, or begin, at a page that may not be touched.

    python -m tests.cuda.guarded FOLDER

A forbidden access ends the process with SIGSEGV; otherwise it prints ``guarded N``, the number of
messages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import disco_kernels as dk
from disco_kernels.cuda.launch_pack import CudaGatherPack
from disco_kernels.cuda.launch_widen import widen_
from tests.cuda.cases import DTYPES, LISTS, WIRES, same
from tests.cuda.emulator import EmulatedLauncher, cpu_as_device
from tests.kernels.guard import Pages


def guarded(launcher: EmulatedLauncher, at_end: bool, lists: list[list[int]]) -> int:
    covered = 0
    for dtype in DTYPES:
        for wire in WIRES:
            pages = Pages(at_end)
            x = pages.image(2, 24, 5, 7, dtype)
            pack = dk.GatherPack(lists, "reference", wire_dtype=wire)
            wanted = pack(x)
            prepared = CudaGatherPack(pack.index, launcher)
            for size in (1, 4, 8):
                tables = prepared.lists._tables
                tables["groups", size, x.device] = pages.guarded(
                    prepared.lists.groups_on(x.device, size)
                )
            messages = [pages.guarded(torch.zeros_like(message)) for message in wanted]
            prepared.run(x, messages)
            for message, reference in zip(messages, wanted, strict=True):
                assert same(message, reference), (dtype, wire, lists)
                covered += 1
            for message, count in zip(messages, pack.counts, strict=True):
                values, scale = dk.message_views(message, (2, 5, 7), count)
                widen_(values, scale, pages.image(2, count, 5, 7, dtype), launcher)
            pages.close()
    return covered


if __name__ == "__main__":
    with cpu_as_device():
        made = EmulatedLauncher(Path(sys.argv[1]))
        # A length that is no multiple of 16 bytes would end beside the page's end or begin.
        done = sum(guarded(made, at_end, one) for at_end in (False, True) for one in LISTS)
    print("guarded", done)
