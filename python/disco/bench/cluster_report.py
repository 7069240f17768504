"""What `disco bench cluster` measured: rows, ratios, a table, JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from disco.bench.lab import Calibration
from disco.bench.tables import table
from disco.bench.timing import Timing


@dataclass(frozen=True)
class Row:
    """One system at one rate.

    Attributes:
        system: "one node", "dense exchange" or "disco".
        engine: that computes.
        threads: of each process.
        rate: of every node's link.
        transport, wire_dtype, density, overlap: None for one node.
        latency_ms: of single requests.
        throughput_img_s: with two requests in flight; of one node, one after the other.
        bytes_per_image: counted, all nodes together.
        max_abs_error: to the whole model, dense or sparsified, in torch.
        rss_mb_per_node: what a node's process gained after its imports; None for one node.
    """

    system: str
    engine: str
    threads: int
    rate: str = ""
    transport: str | None = None
    wire_dtype: str | None = None
    density: float | None = None
    overlap: bool | None = None
    latency_ms: Timing = field(default_factory=lambda: Timing(()))
    throughput_img_s: float = 0.0
    bytes_per_image: int = 0
    max_abs_error: float = 0.0
    rss_mb_per_node: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.system == "one node":
            threads = "" if self.threads == 1 else f", {self.threads} threads"
            return f"one node, {self.engine}{threads}"
        overlap = "" if self.overlap else ", no overlap"
        return f"{self.system}, {self.wire_dtype}{overlap}"

    def measured(self, *, timing: Timing, **values: Any) -> Row:
        """The same with results."""
        return replace(self, latency_ms=timing, **values)

    def to_json(self) -> dict[str, Any]:
        ordered = sorted(self.latency_ms.samples_ms)
        return {
            "system": self.system,
            "engine": self.engine,
            "threads": self.threads,
            "rate": self.rate,
            "transport": self.transport,
            "wire_dtype": self.wire_dtype,
            "density": self.density,
            "overlap": self.overlap,
            "latency_ms_median": self.latency_ms.median_ms,
            "latency_ms_p95": ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)],
            "samples": len(ordered),
            "throughput_img_s": self.throughput_img_s,
            "bytes_per_image": self.bytes_per_image,
            "max_abs_error": self.max_abs_error,
            "rss_mb_per_node": self.rss_mb_per_node,
        }


@dataclass(frozen=True)
class ClusterResult:
    """Everything that was found.

    Attributes:
        calibrations: by rate, of the links as they were.
        winograd: setting of the nodes' kernels.
    """

    model: str
    nodes: int
    density: float
    image_size: int
    winograd: str
    rows: tuple[Row, ...]
    calibrations: Mapping[str, Calibration]
    machine: Mapping[str, Any]

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """By rate: what the fastest of DISCO gains over the baselines."""
        found = []
        for rate in dict.fromkeys(row.rate for row in self.rows):
            rows = [row for row in self.rows if row.rate == rate]
            one = _fastest(rows, system="one node")
            entry: dict[str, Any] = {"rate": rate}
            for wire in dict.fromkeys(r.wire_dtype for r in rows if r.system == "disco"):
                ours = _fastest(rows, system="disco", wire_dtype=wire)
                assert ours is not None
                latency = ours.latency_ms.median_ms
                others = {
                    "one_node": one,
                    "dense_exchange_float32": _fastest(
                        rows, system="dense exchange", wire_dtype="float32"
                    ),
                    "dense_exchange_same_dtype": _fastest(
                        rows, system="dense exchange", wire_dtype=wire
                    ),
                }
                entry[str(wire)] = {
                    f"faster_than_{name}": other.latency_ms.median_ms / latency
                    for name, other in others.items()
                    if other is not None
                }
            found.append(entry)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": "cluster",
            "model": self.model,
            "nodes": self.nodes,
            "density": self.density,
            "image_size": self.image_size,
            "winograd": self.winograd,
            "rows": [row.to_json() for row in self.rows],
            "ratios": self.ratios,
            "calibrations": {rate: c.to_json() for rate, c in self.calibrations.items()},
            "machine": dict(self.machine),
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_HEAD]
        for row in self.rows:
            content = row.to_json()
            memory = row.rss_mb_per_node
            rows.append(
                (
                    row.name,
                    row.rate,
                    f"{row.latency_ms.median_ms:.1f}",
                    f"{content['latency_ms_p95']:.1f}",
                    f"{row.throughput_img_s:.1f}",
                    f"{row.bytes_per_image / 1e6:.3f}",
                    f"{row.max_abs_error:.1e}",
                    "" if memory is None else f"{memory:.0f}",
                )
            )
        lines = [table(rows), ""]
        for entry in self.ratios:
            for wire, ratios in entry.items():
                if wire != "rate":
                    text = ", ".join(f"{k.replace('_', ' ')} {v:.2f}x" for k, v in ratios.items())
                    lines.append(f"{entry['rate']}, {wire}: {text}")
        return "\n".join(lines)


_HEAD = (
    "system",
    "rate",
    "ms",
    "p95",
    "img/s, 2 in flight",
    "MB/image",
    "max |error|",
    "MB a node",
)


def _fastest(rows: list[Row], **wanted: Any) -> Row | None:
    found = [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
    return min(found, key=lambda row: row.latency_ms.median_ms, default=None)
