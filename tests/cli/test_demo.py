"""`disco demo`, on a smaller model than its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disco import commands
from disco.bench.demo import run_demo
from disco.bench.report import DemoResult
from tests.cli.conftest import Command

ENGINES = {"torch_eager", "two_nodes_dense", "two_nodes_disco", "swapped", "compiled"}


def test_demo(disco: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[DemoResult] = []

    def recorded(*args: Any) -> DemoResult:
        results.append(run_demo(*args))
        return results[-1]

    monkeypatch.setattr(commands, "run_demo", recorded)
    path, kept = tmp_path / "demo.json", tmp_path / "kept"
    done = disco(
        *("demo", "--model", "resnet18", "--image-size", "64", "--rounds", "1"),
        *("--json", path, "--keep", kept),
    )
    assert done.code == 0, done.err + done.out
    assert "random weights of seed 0" in done.out and "classes mean nothing" in done.out
    assert {p.name for p in (kept / "disco").iterdir()} == {
        "manifest.json",
        "rank-0.safetensors",
        "rank-1.safetensors",
    }
    data = json.loads(path.read_text())
    assert (data["model"], data["nodes"], data["density"]) == ("torchvision resnet18", 2, 0.2)
    assert 0 < data["max_abs_error"] <= data["tolerance"] < 1e-3 * data["output_scale"]
    assert data["bytes_exchanged_planned"] == data["bytes_exchanged_counted"]
    assert data["bytes_dense_exchange"] == data["bytes_dense_exchange_counted"]
    assert data["bytes_dense_exchange"] >= 5 * data["bytes_exchanged_counted"] > 0
    assert len(data["flops_per_node"]) == len(data["weight_bytes_per_node"]) == 2
    assert max(data["weight_bytes_per_node"]) <= 0.31 * data["weight_bytes_dense"]
    assert sum(data["flops_per_node"]) < 0.65 * data["flops_dense"]
    assert set(data["latency_ms"]) == ENGINES and min(data["latency_ms"].values()) > 0
    assert data["engines"]["two_nodes_disco"]["processes"] == 2
    (result,) = results
    _fails_loudly(result, disco, monkeypatch)


def _fails_loudly(result: DemoResult, disco: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result with something wrong in it must not pass."""
    comparison = result.comparisons["two_nodes_disco"]
    wrong = {
        "differs from the whole model": replace(
            result,
            comparisons={
                **result.comparisons,
                "two_nodes_disco": replace(comparison, max_abs_error=comparison.tolerance * 2),
            },
        ),
        "bytes planned and": replace(result, bytes_counted=result.bytes_counted + 4),
        "two_nodes_disco differs": replace(
            result,
            comparisons={
                **result.comparisons,
                "two_nodes_disco": replace(comparison, max_abs_error=float("nan")),
            },
        ),
    }
    for message, bad in wrong.items():
        monkeypatch.setattr(commands, "run_demo", lambda *args, bad=bad: bad)
        done = disco("demo")
        assert done.code == 1, message
        assert "FAILED: " in done.out and message in done.out
