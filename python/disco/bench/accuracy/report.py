"""The table, what of it holds, and the plots."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from disco.bench.accuracy.studies import Study
from disco.bench.accuracy.summary import Line, lines_of
from disco.bench.tables import table
from disco.errors import InputError

_HEAD = (
    "method",
    "nodes",
    "seeds",
    "metric",
    "to dense",
    "to independent",
    "bytes",
    "less",
    "inside",
    "FLOPs",
)


def text_of(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """A table a study, each with what it shows."""
    lines = lines_of(cells)
    parts = []
    for study in dict.fromkeys(line.study.name for line in lines):
        own = [line for line in lines if line.study.name == study]
        parts.append(_of_study(own[0].study, own, cells))
    return "\n\n".join(parts) + f"\n\n{_cost(cells)}"


def _of_study(study: Study, lines: Sequence[Line], cells: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_HEAD, *(_row(line) for line in lines)]
    head = f"{study.text}; mean ± deviation over seeds, differences with 95% intervals"
    return "\n".join([head, "", table(rows), *_findings(study, lines, cells)])


def _row(line: Line) -> tuple[str, ...]:
    scale = 100 if line.study.points == 0.01 else 1
    less, inside = line.times_less, line.times_less_inside
    return (
        line.name,
        str(line.nodes),
        str(len(line.values)),
        f"{scale * line.mean:.2f} ±{scale * line.deviation:.2f}",
        "" if line.to_dense is None else str(line.to_dense),
        "" if line.to_independent is None else str(line.to_independent),
        "" if line.bytes is None else f"{line.bytes:,.0f}",
        "" if less is None else f"{less:.1f}x",
        "" if inside is None else f"{inside:.1f}x",
        "" if line.flops_share is None else f"{100 * line.flops_share:.0f}%",
    )


def _findings(
    study: Study, lines: Sequence[Line], cells: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    for key in sorted(key for key in cells if key.startswith(f"{study.name}/")):
        cell = cells[key]
        if "value_without" in cell:
            left = ", ".join(f"{value:.4f}" for value in cell["value_without"])
            yield f"{key}: {cell['value']:.4f} whole; without one node {left}"
    for key in sorted(key for key in cells if key.startswith(f"{study.name}/")):
        for wire, value in cells[key].get("value_on_ranks", {}).items():
            here = cells[key]["value" if wire == "float32" else f"value_{wire}"]
            # Sums in another order may turn a tie; a decibel is known to its fifth digit.
            same = "the same" if math.isclose(value, here, rel_tol=1e-5) else f"{here:.6f} here"
            yield f"{key}: {value:.4f} over processes, {wire} on the wire ({same})"


def _cost(cells: Mapping[str, Mapping[str, Any]]) -> str:
    hours = sum(float(cell["seconds"]) for cell in cells.values()) / 3600
    return f"{len(cells)} cells, {hours:.2f} hours of training and measuring"


def plot(cells: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """The metric against the bytes, a PNG a study. InputError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed: `pip install matplotlib`")
    lines = lines_of(cells)
    paths = []
    for name in dict.fromkeys(line.study.name for line in lines):
        own = [line for line in lines if line.study.name == name]
        path = folder / f"accuracy-{name}.png"
        _draw(own, path)
        paths.append(path)
    return paths


def _draw(lines: Sequence[Line], path: Path) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    scale = 100 if lines[0].study.points == 0.01 else 1
    counts = [n for n in lines[0].study.methods if any(line.nodes == n for line in lines)]
    figure, axes = pyplot.subplots(
        1, len(counts), figsize=(6.5 * len(counts), 5), squeeze=False, sharey=True
    )
    dense = next((line for line in lines if line.nodes == 1), None)
    for axis, nodes in zip(axes[0], counts, strict=True):
        shown = [(line, line.bytes) for line in lines if line.nodes == nodes]
        for number, (line, exchanged) in enumerate(shown):
            axis.errorbar(
                (exchanged or 0.0) / 1e3,
                scale * line.mean,
                yerr=scale * line.deviation,
                fmt="osD^vP*X"[number % 8],
                capsize=2,
                label=line.name,
            )
        if dense is not None:
            axis.axhline(scale * dense.mean, color="0.5", linewidth=1, label="dense")
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlabel("kB exchanged an image")
        axis.set_title(f"{nodes} nodes", fontsize=10)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("metric")
    figure.suptitle(lines[0].study.text, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
