"""Where a model computes while it is trained or measured."""

from __future__ import annotations

import torch

from disco.errors import InputError


def training_device(name: str, amp: bool = False) -> torch.device:
    """The device of a name, with its number.

    Args:
        name: "cpu", "cuda" or "cuda:1".
        amp: it has to compute in bfloat16.

    Raises:
        InputError: it is none of these, or is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the device {name!r} is not supported: give cpu, cuda or cuda:N")
    if amp and device.type != "cuda":
        raise InputError(f"--amp is for CUDA, and the device is {name}: leave it out")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"the device {name} was given, and torch finds no CUDA: give cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"the device {name} was given, and there are {torch.cuda.device_count()} GPUs: give "
            "a smaller number"
        )
    if amp and not torch.cuda.is_bf16_supported():
        raise InputError(f"--amp computes in bfloat16, which {name} does not have: leave it out")
    return torch.device("cuda", device.index or 0)


def describe_device(device: torch.device) -> str:
    """What it is, and torch's version, in a few words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"
