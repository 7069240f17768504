"""Nodes over links of stated rates: DISCO, the dense exchange, and one node alone, in turns.

All systems are alive at once, each rank pinned to its node's core, and only one works at a time.
Every row of a rate is measured in the same minutes on the same cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disco import api
from disco.bench.cluster_report import ClusterResult, Row
from disco.bench.compare import Reference, compare, whole_model, worst
from disco.bench.dense_engines import why_missing
from disco.bench.engine import LocalEngine
from disco.bench.lab import Calibration, Lab, Loopback
from disco.bench.lab.rates import parse_rate
from disco.bench.machine import describe_machine
from disco.bench.timing import Timing, interleave
from disco.errors import InputError
from disco.images import Preprocessing
from disco.recipe import Recipe
from disco.runtime import RankProcesses
from disco.runtime.launched import Launched
from disco.zoo import save_weights, weights_digest

Say = Callable[[str], None]

LOOPBACK = "loopback"
WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")
_ENGINES = ("onnxruntime", "openvino")
_IN_FLIGHT = 2
_PAUSE_S = 0.05
_START_TIMEOUT_S = 600.0
# Of the largest output, one-shot pruned random weights: beyond it something is broken.
_LARGEST_ERROR = 0.1


@dataclass(frozen=True)
class ClusterOptions:
    """What the user chose. `rates` are of `disco.bench.lab`, or "loopback"."""

    source: str = "torchvision"
    model: str = "resnet50"
    weights: Path | None = None
    seed: int = 0
    density: float = 0.2
    nodes: int = 2
    rates: Sequence[str] = ("100mbit", "300mbit", "1gbit", LOOPBACK)
    wire_dtypes: Sequence[str] = ("float32", "float16", "int8")
    rounds: int = 5
    image_size: int = 224
    winograd: str = "off"


@dataclass(frozen=True)
class _System:
    """One way to run the model. `latency` of an engine is what its `measure` gives."""

    row: Row
    process: Launched
    threads: int


def run_cluster(options: ClusterOptions, say: Say) -> ClusterResult:
    """Build, partition, start everything, check outputs, measure at every rate.

    Args:
        options: what to do.
        say: takes progress, a line at a time.

    Raises:
        InputError: options that cannot be, before any work.
        LabUnavailable: this machine or user cannot have a lab.
    """
    _check(options)
    recipe = Recipe(
        source=options.source,
        name=options.model,
        nodes=options.nodes,
        seed=options.seed,
        weights_sha256=weights_digest(options.weights),
        density=options.density,
        preprocessing=Preprocessing.for_size(options.image_size),
    )
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(1, 3, options.image_size, options.image_size, generator=generator)
    rows: list[Row] = []
    calibrations: dict[str, Calibration] = {}
    with tempfile.TemporaryDirectory(prefix="disco-bench-") as name:
        folder = Path(name)
        say(f"partitioning {options.source} {options.model} for {options.nodes} nodes")
        references = _partition(options, recipe, x, folder)
        for rate in options.rates:
            # A lab of its own: a connection keeps the offload of the link that it was opened over.
            local = rate == LOOPBACK
            hosts = Loopback(options.nodes) if local else Lab(options.nodes, rate)
            with hosts, _Running(options, hosts, folder, say) as everyone:
                everyone.check(x, references)
                if isinstance(hosts, Lab):
                    calibrations[rate] = hosts.calibrate()
                    say(f"{rate}: {calibrations[rate]}")
                rows += everyone.measure(rate, x)
    return ClusterResult(
        model=f"{options.source} {options.model}",
        nodes=options.nodes,
        density=options.density,
        image_size=options.image_size,
        winograd=options.winograd,
        rows=tuple(rows),
        calibrations=calibrations,
        machine=describe_machine("onnxruntime", "openvino"),
    )


class _Running:
    """All systems, started on some hosts."""

    def __init__(
        self, options: ClusterOptions, hosts: Lab | Loopback, folder: Path, say: Say
    ) -> None:
        self._options = options
        self._hosts = hosts
        self._folder = folder
        self._say = say
        self._stack = ExitStack()
        self._systems: list[_System] = []
        self._errors: dict[int, float] = {}

    def __enter__(self) -> _Running:
        with ExitStack() as stack:
            for system in self._all():
                stack.enter_context(system.process)
                self._systems.append(system)
                self._say(f"ready: {system.row.name}")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _all(self) -> Iterator[_System]:
        loopback = isinstance(self._hosts, Loopback)
        # Over loopback the question is another: are two processes better than two threads?
        cores = [core for owned in self._hosts.cores for core in owned] if loopback else None
        threads = self._options.nodes if loopback else 1
        for kind in _ENGINES:
            if why_missing(kind) is None:
                engine = LocalEngine(
                    kind,
                    source=self._options.source,
                    name=self._options.model,
                    weights=self._folder / "dense.safetensors",
                    nodes=self._options.nodes,
                    pattern=None,
                    image_size=self._options.image_size,
                    threads=threads,
                    start_timeout_s=_START_TIMEOUT_S,
                    popen=partial(self._hosts.popen, 0, cores=cores),
                )
                yield _System(Row(system="one node", engine=kind, threads=threads), engine, threads)
        for kind, wire, overlap in self._exchanging():
            row = Row(
                system="disco" if kind == "disco" else "dense exchange",
                engine="disco",
                threads=1,
                transport="tcp",
                wire_dtype=wire,
                density=self._options.density if kind == "disco" else 1.0,
                overlap=overlap,
            )
            process = RankProcesses(
                self._folder / f"{kind}-{wire}",
                threads=1,
                transport="tcp",
                timeout_s=120.0,
                silence_s=30.0,
                hosts=self._hosts,
                overlap=overlap,
                winograd=self._options.winograd,
            )
            yield _System(row, process, 1)

    def _exchanging(self) -> Iterator[tuple[str, str, bool]]:
        for wire in self._options.wire_dtypes:
            if wire in ("float32", "int8"):
                yield "dense", wire, True
        for wire in self._options.wire_dtypes:
            yield "disco", wire, True
            if wire in ("float32", "int8"):
                yield "disco", wire, False

    def check(self, x: Tensor, references: Mapping[str, Mapping[int, Reference]]) -> None:
        """Every system's output for two inputs, so that one that ignores its input is noticed."""
        for index, system in enumerate(self._systems):
            kind = "disco" if system.row.system == "disco" else "dense"
            comparisons = []
            for scale, reference in references[kind].items():
                if isinstance(system.process, RankProcesses):
                    outputs = list(system.process.run(x / scale).outputs)
                else:
                    assert isinstance(system.process, LocalEngine)
                    outputs = [system.process.run(x / scale)]
                comparisons += [compare(output, reference) for output in outputs]
            found = worst(comparisons)
            allowed = _LARGEST_ERROR * references[kind][1].scale
            if not (found.equal or _is_narrow(system.row)) or found.max_abs_error > allowed:
                raise RuntimeError(f"{system.row.name} is wrong: {found}")
            self._errors[index] = found.max_abs_error

    def measure(self, rate: str, x: Tensor) -> list[Row]:
        """A row a system."""

        def turn(system: _System) -> Callable[[int, int], list[float]]:
            return lambda warmup, repeats: system.process.measure(x, warmup=warmup, repeats=repeats)

        names = {str(index): turn(system) for index, system in enumerate(self._systems)}
        timings = interleave(
            names,
            rounds=self._options.rounds,
            repeats=3,
            warmup=2,
            pause_s=_PAUSE_S,
            progress=lambda done: self._say(f"{rate}: round {done} of {self._options.rounds}"),
        )
        return [
            self._row(rate, x, index, system, timings[str(index)])
            for index, system in enumerate(self._systems)
        ]

    def _row(self, rate: str, x: Tensor, index: int, system: _System, timing: Timing) -> Row:
        per_second, num_bytes, memory = 1e3 / timing.median_ms, 0, None
        process = system.process
        if isinstance(process, RankProcesses):
            repeats = max(4, min(40, round(4e3 / timing.median_ms)))
            seconds = process.measure_stream(x, in_flight=_IN_FLIGHT, warmup=2, repeats=repeats)
            per_second = repeats / max(seconds)
            num_bytes = sum(process.run(x).bytes_sent)
            memory = max(process.memory_growth()) / 1e6
        return system.row.measured(
            rate=rate,
            timing=timing,
            throughput_img_s=per_second,
            bytes_per_image=num_bytes,
            max_abs_error=self._errors[index],
            rss_mb_per_node=memory,
        )


def _partition(
    options: ClusterOptions, recipe: Recipe, x: Tensor, folder: Path
) -> dict[str, dict[int, Reference]]:
    """Write the weights and all partitions; what to expect of each system for x / divisor."""
    model = recipe.build_dense(options.weights)
    save_weights(model, folder / "dense.safetensors")
    references = {"dense": {scale: whole_model(model, x / scale) for scale in (1, 2)}}
    dense = api.partition(model, (x,), options.nodes, dense_exchange=True)
    for wire in ("float32", "int8"):
        narrowed = api.with_wire_dtype(dense, getattr(torch, wire))
        narrowed.save(folder / f"dense-{wire}", model_description={})
    pattern = recipe.sparsify_(model)
    references["disco"] = {scale: whole_model(model, x / scale) for scale in (1, 2)}
    sparse = api.partition(model, (x,), options.nodes, pattern=pattern)
    for wire in options.wire_dtypes:
        narrowed = api.with_wire_dtype(sparse, getattr(torch, wire))
        narrowed.save(folder / f"disco-{wire}", model_description={})
    return references


def _is_narrow(row: Row) -> bool:
    return row.wire_dtype not in (None, "float32")


def _check(options: ClusterOptions) -> None:
    unknown = [wire for wire in options.wire_dtypes if wire not in WIRE_DTYPES]
    if unknown or not options.wire_dtypes:
        raise InputError(
            f"wire dtypes {', '.join(map(repr, unknown)) or 'none'} were given: give some of "
            f"{', '.join(WIRE_DTYPES)}"
        )
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds} was given; at least 1 is needed")
    for rate in options.rates:
        if rate != LOOPBACK:
            parse_rate(rate)
    if not options.rates:
        raise InputError("no rate was given: name some, for example 100mbit,1gbit,loopback")
    if options.nodes < 2:
        raise InputError(f"{options.nodes} nodes were given; a cluster has at least 2")
