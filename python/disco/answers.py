"""A model's answers as files: tensors by name, in safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from disco.errors import InputError
from disco.whole_file import write_whole_file

ONE = "output"  # the name of an answer that is one tensor


def answers_folder(folder: Path) -> Path:
    """The folder, made if it is not there. InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"answers cannot be written into {folder}: {error.strerror}: give another folder"
        ) from error
    return folder


def write_answer(folder: Path, image: Path, answer: Any) -> Path:
    """Write a model's answer for an image, `photo.jpg`, as `photo.jpg.safetensors`.

    Args:
        folder: is there.
        image: of which the name counts.
        answer: a tensor, which is called "output", or tensors in tuples, lists and dicts, called by
            their places: "out", "boxes.0". Numbers and None are left out.

    Returns:
        The file.

    Raises:
        InputError: it cannot be written; a file of that name is as it was.
    """
    named = dict(_named(answer, ""))
    path = folder / f"{image.name}.safetensors"
    # Tensors of an answer may share memory, which the format refuses.
    apart = {k: v.clone().contiguous() for k, v in named.items()}
    write_whole_file(path, lambda part: safetensors.torch.save_file(apart, part))
    return path


def _named(answer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(answer, Tensor):
        yield name or ONE, answer.detach().cpu()
    elif isinstance(answer, Mapping):
        for key, value in answer.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(answer, (tuple, list)):
        for index, value in enumerate(answer):
            yield from _named(value, f"{name}.{index}" if name else str(index))
