"""A small partition made by the command itself, and a way to call the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from disco.cli import main
from disco.images import default_photograph

MODEL = ("resnet18", "--image-size", "32")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def disco(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `disco` with arguments in this process."""

    def run(*args: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else 1
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def photo() -> Path:
    return default_photograph()


@pytest.fixture(scope="session")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-18 for two nodes at density 0.2, from random weights. Copy it to change it."""
    out = tmp_path_factory.mktemp("partitioned") / "out"
    assert main(["partition", *MODEL, "--density", "0.2", "--out", str(out)]) == 0
    return out
