"""Means over seeds, and paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disco.bench.accuracy.studies import DENSE, FIRST, METHODS, STUDIES, Method, Study
from disco.errors import InputError


@dataclass(frozen=True)
class Difference:
    """Of two methods over the same seeds, in points.

    Attributes:
        mean: of the differences.
        half: half the width of the 95% interval of Student's t; infinite for one seed.
        seeds: how many.
    """

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        width = "" if math.isinf(self.half) else f" ±{self.half:.2f}"
        return f"{self.mean:+.2f}{width}"


@dataclass(frozen=True)
class Line:
    """A method in a study, on some nodes, with a dtype on the wire.

    Attributes:
        study, method, nodes: which.
        wire: dtype of payloads.
        values: of the metric, by seed.
        bytes: an image, the mean over seeds; None for the dense model as it is.
        bytes_dense: where all channels travel, in their own dtype.
        bytes_outputs: what independent nodes send, the outputs; None if unknown.
        bytes_outputs_wire: of `bytes`, with this line's dtype on the wire; None if unknown.
        flops_share: of the dense model's FLOPs, that of the node that computes most.
        to_dense, to_independent: paired differences; None if there is nothing to compare with.
    """

    study: Study
    method: Method
    nodes: int
    wire: str
    values: Mapping[int, float]
    bytes: float | None
    bytes_dense: float | None
    bytes_outputs: float | None
    bytes_outputs_wire: float | None
    flops_share: float | None
    to_dense: Difference | None
    to_independent: Difference | None

    @property
    def name(self) -> str:
        """For people."""
        return self.method.text + ("" if self.wire == "float32" else f", {self.wire} on the wire")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float:
        """Of the seeds' values, 0 for one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0

    @property
    def times_less(self) -> float | None:
        """Bytes of the dense exchange over those of this."""
        return _times(self.bytes_dense, self.bytes)

    @property
    def times_less_inside(self) -> float | None:
        """The same without the outputs, which nothing saves."""
        if self.bytes_outputs is None or self.bytes_outputs_wire is None:
            return None
        return _times(
            _less(self.bytes_dense, self.bytes_outputs), _less(self.bytes, self.bytes_outputs_wire)
        )


def _less(total: float | None, part: float) -> float | None:
    return None if total is None else total - part


def _times(dense: float | None, ours: float | None) -> float | None:
    return None if dense is None or ours is None or ours <= 0 else dense / ours


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], points: float
) -> Difference | None:
    """The difference over the seeds that both have. None if there are none.

    Args:
        ours, theirs: the metric by seed.
        points: of the metric that are one point.
    """
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    differences = [(ours[seed] - theirs[seed]) / points for seed in common]
    return Difference(statistics.fmean(differences), _half(differences), len(common))


def lines_of(cells: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """All lines of a table, by study, nodes and method, in the order of `studies`."""
    lines: list[Line] = []
    for study in STUDIES.values():
        if dense := _by_seed(cells, study, DENSE, 1):
            lines.append(_line(study, METHODS[DENSE], 1, "float32", dense, {}, {}))
        for nodes in study.methods:
            lines += _of_nodes(cells, study, nodes, _values(dense, "value"))
    return lines


def _of_nodes(
    cells: Mapping[str, Mapping[str, Any]], study: Study, nodes: int, dense: Mapping[int, float]
) -> list[Line]:
    lines = []
    independent = _by_seed(cells, study, "independent", nodes)
    for name in study.methods[nodes]:
        if name in (DENSE, FIRST):
            continue
        found = _by_seed(cells, study, name, nodes)
        for wire in ("float32", *METHODS[name].wire_dtypes) if found else ():
            lines.append(_line(study, METHODS[name], nodes, wire, found, dense, independent))
    return lines


def _line(
    study: Study,
    method: Method,
    nodes: int,
    wire: str,
    found: Mapping[int, Mapping[str, Any]],
    dense: Mapping[int, float],
    independent: Mapping[int, Mapping[str, Any]],
) -> Line:
    values = _values(found, "value" if wire == "float32" else f"value_{wire}")
    exchanges = [cell["exchange"] for cell in found.values() if "exchange" in cell]
    outputs = _mean([cell["exchange"]["bytes"] for cell in independent.values()])
    narrow = [e.get("bytes_outputs_wire", {}).get(wire) for e in exchanges]
    return Line(
        study=study,
        method=method,
        nodes=nodes,
        wire=wire,
        values=values,
        bytes=_mean(
            [e["bytes"] if wire == "float32" else e["bytes_wire"][wire] for e in exchanges]
        ),
        bytes_dense=_mean([e["bytes_dense"] for e in exchanges]),
        bytes_outputs=outputs,
        bytes_outputs_wire=outputs
        if wire == "float32"
        else _mean([b for b in narrow if b is not None]),
        flops_share=_mean([e["flops_most"] / e["flops_dense"] for e in exchanges]),
        to_dense=paired(values, dense, study.points),
        to_independent=paired(values, _values(independent, "value"), study.points)
        if method.name != "independent"
        else None,
    )


def _by_seed(
    cells: Mapping[str, Mapping[str, Any]], study: Study, method: str, nodes: int
) -> dict[int, Mapping[str, Any]]:
    prefix = f"{study.name}/{method}/{nodes}/"
    keys = [key for key in cells if key.startswith(prefix)]
    return {int(key[len(prefix) :]): cells[key] for key in sorted(keys)}


def _values(found: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    return {seed: float(cell[name]) for seed, cell in found.items()}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _half(differences: Sequence[float]) -> float:
    count = len(differences)
    if count < 2:
        return math.inf
    return _t(count - 1) * statistics.stdev(differences) / math.sqrt(count)


def _t(freedom: int) -> float:
    """Student's t that 95% of draws lie within."""
    try:
        from scipy.stats import t  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise InputError(
            "confidence intervals need scipy, which is not installed: `pip install scipy`"
        ) from error
    return float(t.ppf(0.975, freedom))
