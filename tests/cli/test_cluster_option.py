"""`disco partition --cluster FILE`: planned for the nodes in it, and checked like any partition."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import MODEL, Command

CLUSTER = """
nodes:
  - {name: big, speed_gflops: 20, memory: 1 GB, link: {bandwidth_mbit_s: 1000, latency_ms: 0.2}}
  - {name: small, speed_gflops: 5, memory: 64 MiB, link: {bandwidth_mbit_s: 100, latency_ms: 0.5}}
"""


def test_an_uneven_cluster_from_file_to_verified_outputs(
    disco: Command, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    out = tmp_path / "out"
    done = disco(
        *("partition", *MODEL, "--density", "0.2"),
        *("--cluster", tmp_path / "cluster.yaml", "--out", out),
    )
    assert done.code == 0, done.err
    assert "predicted latency" in done.out and "predicted on 1 node (big)" in done.out
    assert "memory limits: 1000.00 67.11 MB" in done.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert [node["name"] for node in manifest["plan"]["nodes"]] == ["big", "small"]
    layers = [layer["flops"] for layer in manifest["plan"]["layers"] if layer["flops"]]
    flops = [sum(layer[rank] for layer in layers) for rank in (0, 1)]
    assert flops[0] > 2 * flops[1]
    # The whole model is made again with the same cluster, so with the same zeros.
    verified = disco("verify", out, "--input", photo)
    assert verified.code == 0, verified.err + verified.out
    assert "1 of 1 images equal up to rounding" in verified.out


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (CLUSTER, ("--nodes", "2"), "--nodes: not allowed with argument --cluster"),
        ("nodes: []", (), "the cluster is empty"),
        ("nodes: [{name: a, memory: 1 kB}, {name: b}]", (), "node 'a' .* 0\\.00 MB"),
        (CLUSTER.replace("speed_gflops: 20", "speed: 20"), (), "has 'speed', which is not known"),
        (None, (), "cluster file .* cannot be read"),
    ],
)
def test_a_bad_cluster_is_one_line(
    disco: Command, tmp_path: Path, content: str | None, more: tuple[str, ...], message: str
) -> None:
    path, out = tmp_path / "cluster.yaml", tmp_path / "out"
    if content is not None:
        path.write_text(content)
    done = disco("partition", *MODEL, "--cluster", path, *more, "--out", out)
    assert done.code == 2 and not out.exists()
    (line,) = done.err.strip().splitlines()
    assert re.search(message, line), line
