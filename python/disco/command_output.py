"""What commands print and write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from disco.errors import InputError
from disco.whole_file import check_can_be_written, write_whole_file


def check_json(path: Path | None) -> None:
    """Refuse now what could not be written after minutes of work."""
    if path is not None:
        check_can_be_written(path, f"--json {path}")


def write_json(path: Path | None, data: Any) -> None:
    if path is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    write_whole_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise  # whoever read it has gone: no mistake
    except OSError as error:
        # Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"the standard output cannot be written: {error.strerror}") from error
