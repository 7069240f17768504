"""What holds for every test; nothing here imports torch before OpenMP is told how to wait."""

import os
from pathlib import Path

import pytest

# Tests run beside other work, and start processes that share the cores. OpenMP's threads would spin
# for a time slice at each barrier, waiting for one that does not run: ten times as long, measured.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests of these rooms capture models on their way to something else.
_CAPTURE_ON_THE_WAY = {
    *("bench", "cli", "executor", "partition", "runtime", "sparsify", "tasks", "train")
}
# Tests of these rooms start ranks and commands; what a fresh process imports is seen by others.
_START_PROCESSES = {*("bench", "cli", "executor", "partition", "runtime", "tasks", "train")}
_HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _exported_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the same structure are exported once, but in tests that are marked as slow."""
    room = request.path.relative_to(_HERE).parts[0]
    if room in _CAPTURE_ON_THE_WAY and request.node.get_closest_marker("slow") is None:
        from tests.exported_once import install

        install(monkeypatch)


@pytest.fixture(autouse=True)
def _warm_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes begin with torch imported, but in tests marked as slow or cold."""
    room = request.path.relative_to(_HERE).parts[0]
    marked = any(request.node.get_closest_marker(name) for name in ("slow", "cold"))
    if room in _START_PROCESSES and not marked:
        from tests.warm_start import install

        install(monkeypatch)
