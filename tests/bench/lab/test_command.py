"""`disco lab`: prefixes, exit codes, interruption, and what it says where it cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path

import pytest

from disco.bench.lab import Lab, requirements
from disco.cli import main

needs_lab = pytest.mark.usefixtures("lab_rights")


def disco_lab(*words: str) -> int:
    """Run `disco lab` here; its exit code."""
    try:
        return main(["lab", *words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@needs_lab
def test_lines_carry_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo $DISCO_LAB_RANK of $DISCO_LAB_NODES: {rank} {address} {other}; echo no >&2"
    assert disco_lab("--nodes", "2", "--rate", "50mbit", "--", "sh", "-c", script) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [
        "[0] 0 of 2: 0 198.18.0.1 {other}",
        "[1] 1 of 2: 1 198.18.0.2 {other}",
    ]
    assert {"[0] no", "[1] no"} < set(err.splitlines())
    assert "lab: node 1: 198.18.0.2, 50mbit, burst 4606 B, queue 8 MiB, offload off" in err


@needs_lab
def test_words_after_the_dashes_are_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert disco_lab("--nodes", "1", "--", "echo", "--nodes", "7", "--", "-h") == 0
    assert capfd.readouterr().out == "[0] --nodes 7 -- -h\n"


@needs_lab
def test_last_line_without_an_end_and_bytes_that_are_no_text(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    assert disco_lab("--nodes", "1", "--", "printf", r"a\n\n\377") == 0
    assert capfdbinary.readouterr().out == b"[0] a\n[0] \n[0] \xff\n"


@needs_lab
def test_code_of_the_first_failure_and_the_others_end(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    script = "if [ {rank} = 1 ]; then exit 7; fi; trap '' TERM; sleep 60"
    assert disco_lab("--nodes", "2", "--", "sh", "-c", script) == 7
    assert time.monotonic() - began < 30
    assert "lab: node 1 failed first, with exit code 7; ended 0" in capfd.readouterr().err


@needs_lab
def test_keep_going(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = "if [ {rank} = 1 ]; then kill -9 $$; fi; sleep 3; echo through"
    target = tmp_path / "result.json"
    words = ("--nodes", "2", "--keep-going", "--json", str(target), "--", "sh", "-c", script)
    assert disco_lab(*words) == 128 + 9
    assert "[0] through" in capfd.readouterr().out
    result = json.loads(target.read_text())
    assert result["exit_codes"] == [0, 137]
    assert result["calibration"] is None
    assert result["machine"]["cores"] >= 1


@needs_lab
def test_calibrate_writes_what_it_prints(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partialmethod(Lab.calibrate, sizes=(64, 1 << 16, 1 << 18))
    monkeypatch.setattr(Lab, "calibrate", few)
    target = tmp_path / "links.json"
    assert disco_lab("--rate", "40mbit", "--calibrate", "--json", str(target)) == 0
    assert "0 -> 1" in capfd.readouterr().out
    result = json.loads(target.read_text())
    assert len(result["calibration"]["links"]) == 2
    assert result["exit_codes"] is None


@needs_lab
def test_ctrl_c_ends_all() -> None:
    marker = f"lab-cli-{os.getpid()}"
    script = f"echo up; (exec -a {marker} sleep 100) & wait"
    with subprocess.Popen(
        [sys.executable, "-m", "disco.cli", "lab", "--nodes", "2", "--", "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = {process.stdout.readline(), process.stdout.readline()}
        assert lines == {"[0] up\n", "[1] up\n"}
        # As a terminal does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().splitlines()[-1] == "disco: interrupted"
    names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert marker[:15].encode() + b"\n" not in names


def test_output_that_nobody_reads() -> None:
    done = subprocess.run(
        f"{sys.executable} -m disco.cli lab --loopback -- yes | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout in ("[0] y\n", "[1] y\n")
    assert "Traceback" not in done.stderr


def test_loopback_says_what_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo {rank} {address} $DISCO_LAB_ADDRESSES; exit $((4 * {rank}))"
    assert disco_lab("--loopback", "--", "sh", "-c", script) == 4
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [
        "[0] 0 127.0.0.1 127.0.0.1,127.0.0.2",
        "[1] 1 127.0.0.2 127.0.0.1,127.0.0.2",
    ]
    assert "lab: loopback: no namespaces and no rate" in err


_AS_NOBODY = """
import os, sys
from disco.cli import main
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(["lab", "--nodes", "2", "--rate", "100mbit", "--", "true"]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_rights_it_says_which() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "disco: error: no network lab here: user 65534 lacks CAP_NET_ADMIN and CAP_SYS_ADMIN: run "
        "it as root, in a container that has both (--cap-add), or under `unshare --user "
        "--map-root-user`; or give --loopback to run without namespaces and without a rate\n"
    )


def test_without_iproute2_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "find_tool", lambda name: None if name == "tc" else name)
    assert disco_lab("--", "true") == 2
    assert "tc not found: install iproute2 (apt-get install iproute2)" in capfd.readouterr().err


def test_elsewhere_than_on_linux(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    for words in ((), ("--loopback",)):
        assert disco_lab(*words, "--", "true") == 2
        assert "the lab needs Linux, also with --loopback: this is Darwin" in capfd.readouterr().err


@needs_lab
def test_delay_where_the_kernel_has_no_netem(capfd: pytest.CaptureFixture[str]) -> None:
    code = disco_lab("--delay", "1ms", "--", "true")
    err = capfd.readouterr().err
    if code == 0:
        pytest.skip("this kernel has netem")
    assert code == 2
    assert "no netem queueing discipline, which a delay needs" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to do: give a command after --"),
        (("--rate", "fast", "--", "true"), "a rate is a number and bit, kbit, mbit or gbit"),
        (("--rate", "1mbit,2mbit,3mbit", "--", "true"), "3 rates for 2 nodes"),
        (("--nodes", "0", "--", "true"), "a lab has 1 to 254 nodes, not 0"),
        (("--delay", "5", "--", "true"), "for example 1ms, not '5'"),
        (("--cores", "x", "--", "true"), "for example 0,1 or 0-3,4-7, not 'x'"),
        (("--loopback", "--rate", "1mbit", "--", "true"), "--loopback has no wires for --rate"),
        (("--loopback", "--calibrate"), "--loopback has no wires for --calibrate"),
        (("--loopback", "--", "nonesuch"), "cannot start 'nonesuch': No such file or directory"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert disco_lab(*words) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("disco: error: ")
    assert message in last
