"""The device code: where it lies, and what makes one version of it differ from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT_SOURCE = "kernels.cuh"
# In a source tree csrc/cuda, elsewhere what CMake installed beside this file. The tree goes first:
# an editable install leaves copies here, which may be old.
_FOLDERS = (Path(__file__).parents[2] / "csrc" / "cuda", Path(__file__).parent / "cuh")


def read_sources() -> dict[str, str]:
    """Contents of the device code's files by name.

    Raises RuntimeError where they are not, saying which folders were searched.
    """
    for folder in _FOLDERS:
        if (folder / ROOT_SOURCE).is_file():
            return {
                path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))
            }
    searched = " and ".join(str(folder) for folder in _FOLDERS)
    raise RuntimeError(
        f"the CUDA sources are missing: no {ROOT_SOURCE} in {searched}; install again"
    )


def digest(sources: dict[str, str], *also: str) -> str:
    """Names a build of the sources with what else decides about it."""
    made = hashlib.sha256()
    for text in (*(part for item in sorted(sources.items()) for part in item), *also):
        encoded = text.encode()
        made.update(len(encoded).to_bytes(8, "little"))
        made.update(encoded)
    return made.hexdigest()[:32]
