"""The file of results: one entry a cell, added under a lock, so that processes can share it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disco.bench.machine import describe_machine
from disco.command_output import write_json
from disco.errors import InputError

_FORMAT, _VERSION = "disco-accuracy", 1


class Results:
    """Cells by key, in a file.

    Args:
        path: need not exist.

    Raises:
        InputError: the file is something else, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells = self._read()

    @property
    def cells(self) -> Mapping[str, Mapping[str, Any]]:
        """All that are there, by key."""
        return self._cells

    def add(self, key: str, cell: Mapping[str, Any]) -> None:
        """Write one, with those that other processes have added since."""
        with self._locked():
            self._cells = {**self._read(), key: dict(cell)}
            plain = {"format": _FORMAT, "version": _VERSION, "cells": self._cells}
            write_json(self.path, plain)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            plain = json.loads(self.path.read_text(encoding="utf-8"))
            known = (plain["format"], plain["version"]) == (_FORMAT, _VERSION)
            cells = dict(plain["cells"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path} holds no results of `disco bench accuracy` ({error!r}): give another "
                "file"
            ) from error
        if not known:
            raise InputError(f"{self.path} is of another version: give another file")
        return cells

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def made_by() -> dict[str, Any]:
    """Machine, versions, date and command, for a cell."""
    return describe_machine("torchmetrics", "scikit-learn", "scikit-image")
