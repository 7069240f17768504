"""What is measured of a finished run: its metric, what its nodes exchange and compute."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disco import api
from disco.bench.accuracy.cells import Cell
from disco.partition import Plan
from disco.runtime import RankProcesses
from disco.sparsify import WireSimulation
from disco.train import Run, evaluate_run
from disco_kernels.pattern import Pattern

Say = Callable[[str], None]
_WIRE = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exchange:
    """Of one image and all nodes together.

    Attributes:
        bytes: exchanged, by the plan (which the runtime's counts are tested against).
        bytes_dense: where all channels are.
        bytes_wire: by the dtype on the wire, where others were measured.
        bytes_outputs_wire: of these, what independent nodes send with that dtype, by its name.
        flops, flops_dense: of all nodes; of the dense model.
        flops_most: of the node that computes most.
    """

    bytes: int
    bytes_dense: int
    bytes_wire: Mapping[str, int]
    bytes_outputs_wire: Mapping[str, int]
    flops: int
    flops_dense: int
    flops_most: int

    def to_json(self) -> dict[str, Any]:
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.__dict__.items()}


def measure(cell: Cell, run: Run, device: str, say: Say) -> dict[str, Any]:
    """Everything that a cell tells, as plain values.

    Args:
        cell: whose run it is.
        run: finished.
        device: of the whole model; nodes are measured on the CPU.
        say: takes lines about images that cannot be read.
    """
    whole = evaluate_run(run, say, device=device)
    found: dict[str, Any] = {"metric": whole.metric, "value": whole.value, "images": whole.images}
    if cell.nodes == 1:
        return found
    model, pattern = run.load_model(), _pattern_of(run)
    example = _example(run)
    parted = api.partition(model, (example,), cell.nodes, pattern=pattern)
    wires, outputs = {}, {}
    for name in cell.method.wire_dtypes:
        wired = api.partition(
            model, (example,), cell.nodes, pattern=pattern, wire_dtype=_WIRE[name]
        )
        found[f"value_{name}"] = evaluate_run(run, say, predict=wired).value
        wires[name] = wired.plan.bytes_per_image
        outputs[name] = bytes_outputs(run, cell.nodes, name)
    found["exchange"] = _exchange(parted.plan, wires, outputs).to_json()
    if cell.method.loses_nodes:
        found["value_without"] = _without_nodes(cell, run, model, say)
    if cell.method.on_ranks and cell.nodes == 2 and cell.seed == 0:
        found["value_on_ranks"] = _on_ranks(cell, run, say)
    return found


def bytes_dense(run: Run, nodes: int) -> int:
    """What the dense model's nodes exchange an image."""
    model = run.load_model()
    return api.partition(model, (_example(run),), nodes, dense_exchange=True).plan.bytes_per_image


def bytes_outputs(run: Run, nodes: int, wire: str) -> int:
    """What independent nodes of the run's model would exchange an image: its outputs, or parts of
    what they are computed from, which payloads in a narrow dtype (`wire`) may be as well."""
    model, example = run.load_model(), (_example(run),)
    api.sparsify_(model, nodes, 0.0, example)
    return api.partition(model, example, nodes, wire_dtype=_WIRE[wire]).plan.bytes_per_image


def _exchange(plan: Plan, wires: Mapping[str, int], outputs: Mapping[str, int]) -> Exchange:
    return Exchange(
        bytes=plan.bytes_per_image,
        bytes_dense=plan.bytes_dense_exchange,
        bytes_wire=wires,
        bytes_outputs_wire=outputs,
        flops=sum(plan.flops_per_rank),
        flops_dense=plan.flops_dense,
        flops_most=max(plan.flops_per_rank),
    )


def _without_nodes(cell: Cell, run: Run, model: nn.Module, say: Say) -> list[float]:
    """The metric without each node in turn: its channels are zeros, as the runtime has it."""
    simulation = WireSimulation(cell.nodes)
    simulation.attach(model, (_example(run),))
    values = []
    try:
        for rank in range(cell.nodes):
            with simulation.without((rank,)):
                values.append(evaluate_run(run, say, predict=model).value)
    finally:
        simulation.detach()
    return values


def _on_ranks(cell: Cell, run: Run, say: Say) -> dict[str, float]:
    """The metric over processes, one a node, by the dtype on the wire."""
    values = {}
    model, pattern = run.load_model(), _pattern_of(run)
    for name, dtype in (("float32", None), *((n, _WIRE[n]) for n in cell.method.wire_dtypes)):
        parted = api.partition(
            model, (_example(run),), cell.nodes, pattern=pattern, wire_dtype=dtype
        )
        with tempfile.TemporaryDirectory() as folder:
            parted.save(Path(folder) / "parts")
            with RankProcesses(Path(folder) / "parts", threads=1) as ranks:
                values[name] = evaluate_run(run, say, predict=_answers(ranks)).value
    return values


def _answers(ranks: RankProcesses) -> Callable[[Tensor], Any]:
    return lambda inputs: ranks.run(inputs).answer


def _pattern_of(run: Run) -> Pattern | None:
    return Pattern.load(run.pattern) if run.pattern.is_file() else None


def _example(run: Run) -> Tensor:
    size = run.preprocessing.size
    return torch.zeros(1, 3, size, size)
