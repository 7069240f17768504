"""`disco bench cluster`: its ratios on made-up rows, and one small run over loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disco.bench.cluster import ClusterOptions, run_cluster
from disco.bench.cluster_report import ClusterResult, Row
from disco.bench.timing import Timing
from disco.cli import main
from disco.errors import InputError

ROW_KEYS = {
    *("system", "engine", "threads", "rate", "transport", "wire_dtype", "density", "overlap"),
    *("latency_ms_median", "latency_ms_p95", "samples", "throughput_img_s", "bytes_per_image"),
    *("max_abs_error", "rss_mb_per_node"),
}


def _row(system: str, ms: tuple[float, ...], **values: Any) -> Row:
    return Row(system=system, engine="e", threads=1, rate="1gbit").measured(
        timing=Timing(ms), **values
    )


def _result(rows: list[Row]) -> ClusterResult:
    return ClusterResult("m", 2, 0.2, 32, "off", tuple(rows), {}, {"date": "today"})


def test_ratios_take_the_fastest_of_each_side() -> None:
    result = _result(
        [
            _row("one node", (80.0, 81.0, 300.0)),
            _row("one node", (70.0, 72.0, 73.0)),
            _row("dense exchange", (400.0,), wire_dtype="float32", overlap=True),
            _row("dense exchange", (100.0,), wire_dtype="int8", overlap=True),
            _row("disco", (50.0,), wire_dtype="float32", overlap=True),
            _row("disco", (36.0,), wire_dtype="int8", overlap=True),
            _row("disco", (40.0,), wire_dtype="int8", overlap=False),
        ]
    )
    (entry,) = result.ratios
    assert entry["rate"] == "1gbit"
    assert entry["int8"] == {
        "faster_than_one_node": 72 / 36,
        "faster_than_dense_exchange_float32": 400 / 36,
        "faster_than_dense_exchange_same_dtype": 100 / 36,
    }
    assert entry["float32"]["faster_than_dense_exchange_same_dtype"] == 8
    content = result.to_json()
    assert all(set(row) == ROW_KEYS for row in content["rows"])
    json.dumps(content)
    assert content["rows"][0]["latency_ms_p95"] == 300.0
    text = str(result)
    assert "disco, int8, no overlap" in text and "faster than one node 2.00x" in text


def test_a_small_cluster_over_loopback() -> None:
    said: list[str] = []
    options = ClusterOptions(
        model="mobilenet_v3_small",
        image_size=64,
        rates=("loopback",),
        wire_dtypes=("float32", "int8"),
        rounds=1,
    )
    rows = run_cluster(options, said.append).rows
    found = {(row.system, row.wire_dtype, row.overlap): row for row in rows if row.transport}
    assert len(found) == 6
    sparse, dense = found["disco", "float32", True], found["dense exchange", "float32", True]
    assert 0 < 3 * sparse.bytes_per_image < dense.bytes_per_image
    assert found["disco", "int8", True].bytes_per_image < sparse.bytes_per_image / 2
    assert sparse.max_abs_error < found["disco", "int8", True].max_abs_error
    for row in found.values():
        assert row.rate == "loopback" and len(row.latency_ms.samples_ms) == 3
        assert row.throughput_img_s > 0 and row.rss_mb_per_node and row.rss_mb_per_node > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire_dtypes": ("int4",)}, "'int4' were given: give some of float32, float16"),
        ({"wire_dtypes": ()}, "none were given"),
        ({"rounds": 0}, "--rounds 0 was given"),
        ({"rates": ()}, "no rate was given"),
        ({"nodes": 1}, "a cluster has at least 2"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_cluster(ClusterOptions(**options), lambda line: None)


def test_a_wrong_rate_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "cluster", "--rates", "fast", "--model", "resnet18"]
    assert main([*arguments, "--image-size", "32"]) == 2
    assert "fast" in capsys.readouterr().err
