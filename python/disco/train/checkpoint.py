"""A training's state in one safetensors file: tensors as tensors, all else as JSON in its header.

Nested dicts, lists and tuples of tensors, numbers, strings, booleans and None go in and come out
equal, bit for bit. Nothing is pickled, so nothing in a file can run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from disco.errors import InputError
from disco.train.files import write_whole
from disco.zoo import state_digest

_VERSION = 1


def save_state(path: Path, state: Any) -> None:
    """Write `state`, all or nothing. Raises TrainingError if it cannot be written."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors)
    text = json.dumps({"version": _VERSION, "state": tree})
    metadata = {"disco": text, "sha256": _digest(text, tensors)}

    def write(part: Path) -> None:
        safetensors.torch.save_file(tensors, part, metadata=metadata)

    write_whole(path, write)


def load_state(path: Path) -> Any:
    """What `save_state` was given; tensors are on the CPU.

    Raises:
        InputError: no such file, a damaged one, or one of another kind or version.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata.get("disco")
        if text is None:
            raise InputError(f"{path} is not a checkpoint of `disco train`: give another file")
        header = json.loads(text)
        if header["version"] != _VERSION:
            raise InputError(
                f"the checkpoint {path} has version {header['version']!r}, and {_VERSION} is read: "
                "resume it with the version of disco that wrote it"
            )
        if _digest(text, tensors) != metadata["sha256"]:
            raise ValueError("its content is not what was written")
        return _unpack(header["state"], tensors)
    except InputError:
        raise
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the checkpoint {path} is missing or damaged ({str(error).strip() or error!r}): "
            "remove it to go on from an older one"
        ) from error


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256((text + state_digest(tensors)).encode()).hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        # Tied tensors share memory, which the format refuses.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in held}
    items = [_unpack(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else items


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators, on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse. A state of a GPU is left out where none is used now."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
