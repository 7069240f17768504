"""Files that commands write: whole or not at all, and through what a path names."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disco.command_output import write_json
from disco.errors import InputError
from disco.partition.shards import check_target
from disco.whole_file import write_whole_file


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    for data in ({"a": 1}, [2]):
        write_json(link, data)
        assert link.is_symlink() and real.read_text() == link.read_text()
    assert real.read_text() == "[\n  2\n]\n"
    assert {p.name for p in tmp_path.rglob("*")} == {"elsewhere", "real.json", "link.json"}


def test_a_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, 3)
    reader.join(timeout=30)
    assert read == ["3\n"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_the_standard_output_is_a_pipe(name: str) -> None:
    code = f"""
from pathlib import Path
from disco.command_output import check_json, write_json
check_json(Path({name!r}))
write_json(Path({name!r}), [5])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[\n  5\n]\n"


def test_a_device_is_written_and_stays_one(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_json(link, 3)
    assert Path("/dev/null").is_char_device() and link.is_symlink()


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_json(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"kept.json cannot be written: File too large"):
            write_json(path, ["new"] * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '"old"\n' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="No such file"):
        write_whole_file(tmp_path / "absent" / "file", lambda part: part.write_text(""))


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    words = ["token", str(tmp_path / "token")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "disco.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    expected = "disco: error: the standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_a_folder_with_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        check_target(tmp_path / ("x" * 300), overwrite=False)
