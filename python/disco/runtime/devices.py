"""Where ranks compute: the CPU, or a GPU of their machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from disco.errors import InputError
from disco.runtime.free_memory import FreeMemory
from disco.runtime.tcp.transport import HEARTBEAT_S, SILENCE_S

CPU = torch.device("cpu")
# A rank on a GPU compiles a kernel when it first meets a shape, for seconds, and says nothing
# meanwhile.
GPU_SILENCE_S = 30.0
_ALLOWED = "give cpu, cuda (ranks of a machine take its GPUs in turns) or cuda:N"


def device_of_rank(name: str, local_index: int) -> torch.device:
    """The device of one rank.

    Args:
        name: "cpu"; "cuda:N", taken as given; "cuda", which is GPU ``local_index`` modulo the
            number of GPUs.
        local_index: of the rank among those of its machine.

    Raises:
        InputError: another name, no GPU here that torch can use, or none of that number.
    """
    if name == "cpu":
        return CPU
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit())):
        raise InputError(f"device {name!r} was given: {_ALLOWED}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        why = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch finds no GPU and driver here"
        )
        raise InputError(
            f"device {name!r} was given, and {why}: compute with cpu, or use a machine with a GPU "
            f"and a torch built for it"
        )
    if colon and int(number) >= count:
        raise InputError(
            f"device {name!r} was given; this machine has cuda:0 to cuda:{count - 1}: {_ALLOWED}"
        )
    return torch.device("cuda", int(number) if colon else local_index % count)


def devices_of_ranks(name: str, world_size: int) -> tuple[torch.device, ...]:
    """As `device_of_rank`, for ranks that are all on this machine."""
    return tuple(device_of_rank(name, rank) for rank in range(world_size))


def silence_of(given: float | None, devices: Sequence[torch.device]) -> float:
    """After how many seconds of silence a peer is lost: as given, else by where ranks compute.

    Raises:
        InputError: no more than pass between two signs of life, or no number.
    """
    if given is not None:
        if not HEARTBEAT_S < given < math.inf:
            raise InputError(
                f"the deadline must be a number of seconds above the {HEARTBEAT_S:g} between "
                f"signs of life, given {given:g}"
            )
        return given
    return SILENCE_S if all(device.type == "cpu" for device in devices) else GPU_SILENCE_S


def identity_of_device(device: torch.device) -> str:
    """The same for the same device only, over all machines; "cpu" for the CPU."""
    if device.type == "cpu":
        return "cpu"
    return f"GPU {torch.cuda.get_device_properties(device).uuid}"


def make_current(device: torch.device) -> None:
    """Let what names no GPU, as pinned memory does, use this one in this thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def free_memory_on(device: torch.device) -> Sequence[FreeMemory] | None:
    """What can still be taken on a GPU; None for the CPU, which `free_memory` knows."""
    if device.type == "cpu":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return [FreeMemory(free_bytes, f"free on {device} ({torch.cuda.get_device_name(device)})")]
