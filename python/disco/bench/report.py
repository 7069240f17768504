"""What `disco demo` measured, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disco.bench.classes import Guess
from disco.bench.compare import Comparison
from disco.bench.lineup import LABELS, Setup
from disco.bench.tables import BUSY, table
from disco.bench.timing import Timing


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demonstration found. Bytes are of one image and over all pairs of nodes.

    Attributes:
        bytes_dense_counted, bytes_dense_planned: where every channel is exchanged.
        bytes_counted, bytes_planned: with DISCO.
        comparisons: per engine, its output against the whole model's in one process.
    """

    model: str
    weights: str
    image: str
    nodes: int
    density: float
    machine: dict[str, Any]
    bytes_dense_planned: int
    bytes_dense_counted: int
    bytes_planned: int
    bytes_counted: int
    flops_dense: int
    flops_per_node: tuple[int, ...]
    weight_bytes_dense: int
    weight_bytes_per_node: tuple[int, ...]
    setups: dict[str, Setup]
    timings: dict[str, Timing]
    comparisons: dict[str, Comparison]
    guesses: Sequence[Guess]

    @property
    def problems(self) -> list[str]:
        """What must not be: outputs that differ, bytes that the plan did not foresee."""
        found = [
            f"{engine} differs from the whole model: {comparison}"
            for engine, comparison in self.comparisons.items()
            if not comparison.equal
        ]
        for what, planned, counted in (
            ("dense exchange", self.bytes_dense_planned, self.bytes_dense_counted),
            ("DISCO", self.bytes_planned, self.bytes_counted),
        ):
            if planned != counted:
                found.append(f"{what}: {planned} bytes planned and {counted} counted")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "model": self.model,
            "weights": self.weights,
            "image": self.image,
            "nodes": self.nodes,
            "density": self.density,
            "max_abs_error": self.comparisons["two_nodes_disco"].max_abs_error,
            "output_scale": self.comparisons["two_nodes_disco"].scale,
            "tolerance": self.comparisons["two_nodes_disco"].tolerance,
            "max_abs_error_per_engine": {
                engine: comparison.max_abs_error for engine, comparison in self.comparisons.items()
            },
            "bytes_dense_exchange": self.bytes_dense_planned,
            "bytes_dense_exchange_counted": self.bytes_dense_counted,
            "bytes_exchanged_planned": self.bytes_planned,
            "bytes_exchanged_counted": self.bytes_counted,
            "flops_dense": self.flops_dense,
            "flops_per_node": list(self.flops_per_node),
            "weight_bytes_dense": self.weight_bytes_dense,
            "weight_bytes_per_node": list(self.weight_bytes_per_node),
            "latency_ms": {name: timing.median_ms for name, timing in self.timings.items()},
            "latency_ms_p10": {name: timing.low_ms for name, timing in self.timings.items()},
            "latency_ms_p90": {name: timing.high_ms for name, timing in self.timings.items()},
            "images_per_s": {name: 1e3 / timing.median_ms for name, timing in self.timings.items()},
            "samples": {name: len(timing.samples_ms) for name, timing in self.timings.items()},
            "engines": {name: asdict(setup) for name, setup in self.setups.items()},
            "top": [
                {"index": g.index, "name": g.name, "probability": g.probability}
                for g in self.guesses
            ],
            "machine": self.machine,
        }

    def __str__(self) -> str:
        return "\n\n".join([self._sizes(), self._latencies(), self._machine()])

    def _sizes(self) -> str:
        total = sum(self.flops_per_node)
        rows = [
            ("", "whole model", f"DISCO, {self.nodes} nodes", "ratio"),
            (
                "weights per node, MB",
                f"{self.weight_bytes_dense / 1e6:.1f}",
                _each(self.weight_bytes_per_node, 1e6, 1),
                f"{max(self.weight_bytes_per_node) / self.weight_bytes_dense:.3f}",
            ),
            (
                "FLOPs per node, G",
                f"{self.flops_dense / 1e9:.2f}",
                _each(self.flops_per_node, 1e9, 2),
                f"{max(self.flops_per_node) / self.flops_dense:.3f}",
            ),
            (
                "FLOPs of all nodes, G",
                f"{self.flops_dense / 1e9:.2f}",
                f"{total / 1e9:.2f}",
                f"{total / self.flops_dense:.3f}",
            ),
        ]
        exchange = [
            ("", "dense exchange", "DISCO", "ratio"),
            (
                "exchanged per image, MB (planned)",
                f"{self.bytes_dense_planned / 1e6:.3f}",
                f"{self.bytes_planned / 1e6:.3f}",
                _times(self.bytes_dense_planned, self.bytes_planned),
            ),
            (
                "exchanged per image, MB (counted)",
                f"{self.bytes_dense_counted / 1e6:.3f}",
                f"{self.bytes_counted / 1e6:.3f}",
                _times(self.bytes_dense_counted, self.bytes_counted),
            ),
        ]
        return f"{table(rows)}\n\n{table(exchange)}"

    def _latencies(self) -> str:
        rows = [("engine", "cores", "kernels", "ms (p10-p90)", "images/s", "max |error|")]
        for engine, timing in self.timings.items():
            setup, comparison = self.setups[engine], self.comparisons[engine]
            rows.append(
                (
                    LABELS[engine],
                    f"{setup.processes} x {setup.threads}",
                    ", ".join(setup.backends),
                    f"{timing.median_ms:.1f} ({timing.low_ms:.1f}-{timing.high_ms:.1f})",
                    f"{1e3 / timing.median_ms:.1f}",
                    f"{comparison.max_abs_error:.1e} of {comparison.scale:.3g}",
                )
            )
        samples = min(len(timing.samples_ms) for timing in self.timings.values())
        slow = sum(t.high_ms > BUSY * t.median_ms for t in self.timings.values())
        busy = f"The machine was busy: p90 is above {BUSY:g} medians for {slow} engine(s)."
        lines = [
            table(rows),
            f"Median of {samples} passes at batch 1, engines in turns; nodes talk over loopback.",
            "Cores are processes x threads. Errors are against torch in one process.",
        ]
        return "\n".join([*lines, busy] if slow else lines)

    def _machine(self) -> str:
        versions = ", ".join(
            f"{name} {version}" for name, version in self.machine["versions"].items()
        )
        where = f"{self.machine['processor']}, {self.machine['cores']} cores"
        what = f"{self.model} with {self.weights}, image {self.image}"
        return f"{where}, {self.machine['system']}\n{versions}\n{what}"


def _each(values: Sequence[int], unit: float, digits: int) -> str:
    texts = [f"{value / unit:.{digits}f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _times(dense: int, sparse: int) -> str:
    return f"{dense / sparse:.2f}x less" if sparse else "no exchange"
