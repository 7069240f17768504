"""Processes from a warm Python are what `subprocess` would have started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm_start

_SAY = """
import json, os, sys
warm = "torch" in sys.modules
import torch
print(json.dumps({
    "warm": warm, "parent": os.getppid(), "name": __name__, "arguments": sys.argv[1:],
    "given": sys.stdin.read(), "folder": os.getcwd(), "set": os.environ.get("SET_HERE"),
    "home": os.environ.get("HOME"), "threads": torch.get_num_threads(), "path": sys.path[0],
    "session": os.getsid(0) == os.getpid(),
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def _environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "HOME"}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_it_is_as_any_other_process(how: str, tmp_path: Path) -> None:
    (tmp_path / "saying.py").write_text(_SAY)
    words = {
        "-c": ["-c", _SAY],
        "-m": ["-m", "saying"],
        "file": [str(tmp_path / "saying.py")],
    }[how]
    done = subprocess.run(
        [sys.executable, *words, "one", "two words"],
        input="from the pipe",
        cwd=tmp_path,
        env=_environment(SET_HERE="yes"),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 7 and done.stderr == "to stderr\n"
    folder = os.path.realpath(tmp_path)
    assert json.loads(done.stdout) == {
        **{"warm": sys.platform == "linux", "parent": os.getpid(), "name": "__main__"},
        **{"arguments": ["one", "two words"], "given": "from the pipe", "folder": folder},
        **{"set": "yes", "home": None, "threads": 1, "session": True},
        "path": "" if how == "-c" else folder,
    }


def test_each_has_its_own_state() -> None:
    """Nothing that one does shows in the next, nor here."""
    code = "import os, torch; torch.left = 1 + getattr(torch, 'left', 0); print(torch.left)"
    for _ in range(2):
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, env=_environment(), text=True) == "1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_signals_end_it(number: signal.Signals) -> None:
    code = "import time; print('here', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def test_an_exception_ends_it() -> None:
    command = [sys.executable, "-c", "raise ValueError('of mine')"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: of mine\n")


def test_others_start_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """With options, of another program, or marked as cold."""
    code = "import sys; print('torch' in sys.modules)"
    for words in ([sys.executable, "-S", "-c", code], [sys.executable, "-B", "-c", code]):
        assert subprocess.check_output(words, env=_environment(), text=True) == "False\n"
    assert subprocess.check_output(["echo", "-c", "x"], text=True) == "-c x\n"
    monkeypatch.setattr(warm_start, "_MOST_SERVERS", 0)
    monkeypatch.setattr(warm_start, "_servers", {})
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=_environment(), text=True) == "False\n"


@pytest.mark.cold
def test_the_mark_is_heeded() -> None:
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert subprocess.check_output(command, text=True) == "False\n"


def test_what_cannot_be_forked_starts_as_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that an import leaves behind would not be there after a fork."""
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
    )
    monkeypatch.setattr(warm_start, "_servers", {})
    path = os.pathsep.join([str(tmp_path), *(os.path.abspath(p) for p in sys.path)])
    code = "import sys; sys.exit('torch' in sys.modules)"
    with pytest.warns(UserWarning, match="processes start cold: threads beside it"):
        done = subprocess.run([sys.executable, "-c", code], env=_environment(PYTHONPATH=path))
    assert done.returncode == 0
