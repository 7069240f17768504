"""What `disco bench throughput` measured, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from disco.bench.compare import Comparison
from disco.bench.lineup import Setup
from disco.bench.tables import BUSY, table
from disco.bench.timing import Timing

DISCO = "disco"


@dataclass(frozen=True)
class Flops:
    """Of one image, 2 per multiply-accumulate, convolutions and linears only."""

    dense: int
    disco: int


@dataclass(frozen=True)
class ThroughputResult:
    """Everything that was found. Mappings are by engine, `DISCO` among them.

    Attributes:
        comparisons: dense engines against the dense model, DISCO against the sparsified one.
        skipped: engine -> why it did not run.
        gathered: values of the DISCO model whose layers skip zeros.
        packed_bytes: of the DISCO model's weights.
        peak_gflops: multiply-add rate of one thread.
    """

    model: str
    weights: str
    nodes: int
    density: float
    threads: int
    batch: int
    image_size: int
    dtype: str
    timings: Mapping[str, Timing]
    setups: Mapping[str, Setup]
    comparisons: Mapping[str, Comparison]
    skipped: Mapping[str, str]
    gathered: tuple[str, ...]
    packed_bytes: int
    flops: Flops
    peak_gflops: float
    machine: Mapping[str, Any]

    @property
    def problems(self) -> list[str]:
        """What makes the numbers worthless."""
        found = []
        if not self.gathered:
            found.append(
                f"no layer of the DISCO model skips anything at density {self.density:g} for "
                f"{self.nodes} nodes: it is the dense model that was measured"
            )
        for engine, comparison in self.comparisons.items():
            if not comparison.equal:
                found.append(f"{engine} differs from the same model in torch: {comparison}")
        for engine, setup in self.setups.items():
            if setup.threads != self.threads:
                found.append(f"{engine} ran on {setup.threads} threads instead of {self.threads}")
        return found

    @property
    def best_dense_engine(self) -> str:
        """The dense engine with the lowest median."""
        dense = {name: t.median_ms for name, t in self.timings.items() if name != DISCO}
        return min(dense, key=lambda name: dense[name])

    @property
    def summary(self) -> dict[str, Any]:
        """DISCO against the best dense engine. A GFLOP counts what is computed, not skipped."""
        best = self.timings[self.best_dense_engine].median_ms
        ours = self.timings[DISCO].median_ms
        per_ms = self.batch * 1e-6
        return {
            "best_dense_engine": self.best_dense_engine,
            "best_dense_ms": best,
            "disco_ms": ours,
            "speedup_vs_best_dense": best / ours,
            "flop_ratio": self.flops.dense / self.flops.disco,
            "peak_gflops_measured": self.peak_gflops,
            "achieved_gflops": self.flops.disco * per_ms / ours,
            "best_dense_gflops": self.flops.dense * per_ms / best,
            "peak_fraction": self.flops.disco * per_ms / ours / (self.peak_gflops * self.threads),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file. Times in ms are of one pass over the batch."""
        return {
            "model": self.model,
            "weights": self.weights,
            "nodes": self.nodes,
            "density": self.density,
            "threads": self.threads,
            "batch": self.batch,
            "image_size": self.image_size,
            "dtype": self.dtype,
            "engines": [self._row(name) for name in self.timings],
            "skipped": dict(self.skipped),
            "summary": self.summary,
            "layers_gathered": len(self.gathered),
            "packed_bytes": self.packed_bytes,
            "flops_dense": self.flops.dense,
            "flops_disco": self.flops.disco,
            "problems": self.problems,
            "machine": dict(self.machine),
        }

    def _row(self, name: str) -> dict[str, Any]:
        timing, comparison = self.timings[name], self.comparisons[name]
        return {
            "engine": name,
            "median_ms": timing.median_ms,
            "p10_ms": timing.low_ms,
            "p90_ms": timing.high_ms,
            "lowest_ms": min(timing.samples_ms),
            "images_per_s": self.batch * 1e3 / timing.median_ms,
            "max_abs_error": comparison.max_abs_error,
            "tolerance": comparison.tolerance,
            "samples": len(timing.samples_ms),
            "threads": self.setups[name].threads,
            "kernels": list(self.setups[name].backends),
        }

    def __str__(self) -> str:
        lines = [self._latencies()]
        lines += [f"skipped: {name} ({reason})" for name, reason in self.skipped.items()]
        slow = sum(t.high_ms > BUSY * t.median_ms for t in self.timings.values())
        if slow:
            lines.append(f"The machine was busy: p90 above {BUSY:g} medians, {slow} engine(s).")
        return "\n\n".join(["\n".join(lines), self._conclusion(), self._machine()])

    def _latencies(self) -> str:
        rows = [("engine", "kernels", "ms (p10-p90)", "images/s", "max |error|")]
        for name, timing in self.timings.items():
            comparison = self.comparisons[name]
            rows.append(
                (
                    name,
                    ", ".join(self.setups[name].backends),
                    f"{timing.median_ms:.1f} ({timing.low_ms:.1f}-{timing.high_ms:.1f})",
                    f"{self.batch * 1e3 / timing.median_ms:.1f}",
                    f"{comparison.max_abs_error:.1e} of {comparison.scale:.3g}",
                )
            )
        samples = min(len(timing.samples_ms) for timing in self.timings.values())
        return (
            f"{table(rows)}\nMedian of {samples} passes at batch {self.batch}, "
            f"{self.threads} thread(s) each, engines in turns."
        )

    def _conclusion(self) -> str:
        s = self.summary
        return (
            f"DISCO, {self.nodes} nodes, density {self.density:g}: "
            f"{s['speedup_vs_best_dense']:.3f}x the best dense engine ({s['best_dense_engine']}); "
            f"the FLOPs alone are {s['flop_ratio']:.3f}x fewer\n"
            f"{len(self.gathered)} layers skip zeros, {self.packed_bytes / 1e6:.1f} MB of packed "
            f"weights; {s['achieved_gflops']:.1f} GFLOP/s, "
            f"{s['peak_fraction']:.0%} of the measured peak ({self.peak_gflops:.1f} a thread); "
            f"{s['best_dense_engine']} {s['best_dense_gflops']:.1f}"
        )

    def _machine(self) -> str:
        known = {name: v for name, v in self.machine["versions"].items() if v is not None}
        return (
            f"{self.machine['processor']}, {self.machine['cores']} cores, "
            f"{self.machine['system']}\n{', '.join(f'{n} {v}' for n, v in known.items())}\n"
            f"{self.model} with {self.weights}, {self.image_size} x {self.image_size}"
        )
