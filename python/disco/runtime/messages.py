"""What the launcher and its child processes say to each other.

One JSON object a line: commands on a child's stdin, replies on its stdout. Tensors go beside, in
safetensors files in a private folder. Nothing is executed that came in a message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Message = dict[str, Any]


def write_message(stream: IO[str], message: Message) -> None:
    """Write one line and flush it."""
    stream.write(json.dumps(message, separators=(",", ":")) + "\n")
    stream.flush()


def read_message(line: str) -> Message:
    """The inverse; raises ValueError for a line that is no JSON object."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"not a JSON object: {line[:80]!r}")
    return message


def by_number(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: contiguous, and none in another's memory, as the same input twice."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for number, tensor in enumerate(tensors):
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        named[str(number)] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return named


def save_tensors(path: str, tensors: list[Tensor]) -> None:
    """Write tensors in order to a safetensors file."""
    save_file(by_number(tensors), path)


def load_tensors(path: str) -> list[Tensor]:
    """The inverse of `save_tensors`."""
    loaded = load_file(path)
    return [loaded[str(i)] for i in range(len(loaded))]


def save_outputs(path: str, value: Any) -> Any:
    """Write what a model returned, over what was there before at once; returns its structure."""
    tensors: list[Tensor] = []
    structure = flatten(value, tensors)
    part = f"{path}.part"
    save_tensors(part, tensors)
    os.replace(part, path)
    return structure


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in nested dicts, lists and tuples to `tensors`.

    Returns:
        the same structure as JSON: a tensor's position, or {"dict": ...}, {"list": ...},
        {"tuple": ...} or {"constant": ...}.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, dict):
        return {"dict": {key: flatten(item, tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"constant": value}
    raise TypeError(
        f"a model's inputs and outputs may hold tensors, constants, dicts, lists and tuples, "
        f"not {value!r}"
    )


def unflatten(template: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(template, int):
        return tensors[template]
    makers: dict[str, Callable[[Any], Any]] = {
        "dict": lambda items: {key: unflatten(item, tensors) for key, item in items.items()},
        "list": lambda items: [unflatten(item, tensors) for item in items],
        "tuple": lambda items: tuple(unflatten(item, tensors) for item in items),
        "constant": lambda value: value,
    }
    ((kind, content),) = template.items()
    return makers[kind](content)
