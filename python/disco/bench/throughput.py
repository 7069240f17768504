"""Whole models on one machine: DISCO's compiled model against the best dense engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from disco import api
from disco.bench.compare import compare, whole_model, worst
from disco.bench.dense_engines import why_missing
from disco.bench.engine import LocalEngine
from disco.bench.lineup import Engines
from disco.bench.machine import describe_machine
from disco.bench.throughput_report import DISCO, Flops, ThroughputResult
from disco.errors import InputError
from disco.images import Preprocessing
from disco.partition.plan import Plan
from disco.recipe import Recipe
from disco.runtime.launched import Launched
from disco.runtime.rank_processes import available_cores
from disco.zoo import save_weights, weights_digest
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status, fma_peak_gflops

Say = Callable[[str], None]

# What the user calls an engine -> what `disco.bench.dense_engines` does.
DENSE_ENGINES = {
    "torch_eager_nchw": "eager",
    "torch_eager_channels_last": "channels_last",
    "torch_compile": "inductor",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
BF16_ENGINES = {"openvino_bf16": "openvino_bf16"}
INT8_ENGINES = {"onnxruntime_int8": "onnxruntime_int8", "openvino_int8": "openvino_int8"}

# By the dtype to compute in: the dense engines, and what DISCO runs.
_LINEUPS = {
    "float32": (torch.float32, DENSE_ENGINES, "compiled"),
    "bfloat16": (torch.bfloat16, BF16_ENGINES, "compiled_bf16"),
    "int8": (torch.int8, INT8_ENGINES, "compiled_int8"),
}
DTYPES = tuple(_LINEUPS)

_START_TIMEOUT_S = 900.0  # torch.compile of a large model on a slow core


@dataclass(frozen=True)
class ThroughputOptions:
    """What the user chose. `engines` are dense ones by name; None takes all that are installed."""

    source: str = "torchvision"
    model: str = "resnet50"
    weights: Path | None = None
    seed: int = 0
    density: float = 0.2
    nodes: int = 2
    threads: int = 1
    batch: int = 1
    rounds: int = 10
    image_size: int = 224
    engines: Sequence[str] | None = None
    dtype: str = "float32"


def run_throughput(options: ThroughputOptions, say: Say) -> ThroughputResult:
    """Build, sparsify, start the engines, check their outputs, measure in turns.

    Args:
        options: what to do.
        say: takes progress, a line at a time.

    Raises:
        InputError: before any work, for what can be checked before.
    """
    _check(options)
    chosen, skipped = choose_engines(options.engines, options.dtype)
    dtype = _LINEUPS[options.dtype][0]
    recipe = Recipe(
        source=options.source,
        name=options.model,
        nodes=options.nodes,
        seed=options.seed,
        weights_sha256=weights_digest(options.weights),
        density=options.density,
        preprocessing=Preprocessing.for_size(options.image_size),
    )
    x = example_batch(options)
    say(f"building {options.source} {options.model}, dense and at density {options.density:g}")
    model = recipe.build_dense(options.weights)
    with tempfile.TemporaryDirectory(prefix="disco-bench-") as name:
        folder = Path(name)
        save_weights(model, folder / "dense.safetensors")
        # Two, so that an engine that ignores its input is noticed.
        inputs = (x, 0.5 * x)
        dense = [whole_model(model, given, dtype=dtype) for given in inputs]
        recipe.sparsify_(model)
        save_weights(model, folder / "sparse.safetensors")
        sparse = [whole_model(model, given, dtype=dtype) for given in inputs]
        plan = _plan(model, recipe)
        del model
        engines = {name: _start(options, kind, folder) for name, kind in chosen.items()}
        everyone: dict[str, Launched] = dict(engines)
        with Engines(everyone, lambda name: say(f"ready: {name}")) as lineup:
            comparisons = {
                name: worst(
                    compare(engine.run(given), reference)
                    for given, reference in zip(
                        inputs, sparse if name == DISCO else dense, strict=True
                    )
                )
                for name, engine in engines.items()
            }
            (ready,) = engines[DISCO].ready
            gathered = tuple(ready["gathered"])
            # Before and after: the clock may have changed. The engines rest meanwhile.
            peaks = [fma_peak_gflops(dtype)]
            timings = lineup.measure(
                x, options.rounds, lambda done: say(f"round {done} of {options.rounds}")
            )
            peaks.append(fma_peak_gflops(dtype))
            setups = lineup.setups
    return ThroughputResult(
        model=f"{options.source} {options.model}",
        weights=_about_weights(options),
        nodes=options.nodes,
        density=options.density,
        threads=options.threads,
        batch=options.batch,
        image_size=options.image_size,
        dtype=options.dtype,
        timings=timings,
        setups=setups,
        comparisons=comparisons,
        skipped=skipped,
        gathered=gathered,
        packed_bytes=ready["packed_bytes"],
        flops=flops_of(plan, gathered),
        peak_gflops=max(peaks),
        machine=describe_machine("onnx", "onnxruntime", "openvino"),
    )


def choose_engines(
    wanted: Sequence[str] | None, dtype: str = "float32"
) -> tuple[dict[str, str], dict[str, str]]:
    """The engines to run and those left out.

    Args:
        wanted: dense engines by name; None for all that are installed.
        dtype: of `DTYPES`; every one has its own engines.

    Returns:
        name -> kind of `disco.bench.engine`, DISCO last; name -> why it is skipped.

    Raises:
        InputError: a name that is none, or an engine asked for by name that cannot run here.
    """
    _, engines, ours = _LINEUPS[dtype]
    names = [name for name in (engines if wanted is None else wanted) if name != DISCO]
    unknown = [name for name in names if name not in engines]
    if unknown or not names:
        raise InputError(
            f"--engines names {', '.join(map(repr, unknown)) or 'no dense engine'}; the dense "
            f"engines in {dtype} are {', '.join(engines)}, and {DISCO} always runs"
        )
    reasons = {name: why_missing(engines[name]) for name in names}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if skipped and wanted is not None:
        name, reason = next(iter(skipped.items()))
        raise InputError(f"the engine {name} cannot run here: {reason}; or leave it out")
    chosen = {name: engines[name] for name in names if name not in skipped}
    return {**chosen, DISCO: ours}, skipped


def example_batch(options: ThroughputOptions) -> Tensor:
    """Standard normal noise of a fixed seed, float32 [batch, 3, size, size].

    No zeros and nothing repeated, so that no engine can gain by either.
    """
    generator = torch.Generator().manual_seed(options.seed)
    size = options.image_size
    return torch.randn(options.batch, 3, size, size, generator=generator)


def flops_of(plan: Plan, gathered: Sequence[str]) -> Flops:
    """What one image costs: the dense model, and DISCO's with the zeros that it does skip.

    Args:
        plan: of the sparsified model.
        gathered: values whose layers skip zeros; the others run dense on one machine.
    """
    skipping = frozenset(gathered)
    done = sum(sum(la.flops) if la.value in skipping else la.flops_dense for la in plan.layers)
    return Flops(dense=plan.flops_dense, disco=done)


def _check(options: ThroughputOptions) -> None:
    if (error := extension_status().error) is not None:
        raise InputError(
            f"the CPU kernels are not there to be measured: {error}; "
            "`python -m disco_kernels` tells more"
        )
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype is {', '.join(DTYPES)}, given {options.dtype!r}")
    if options.dtype == "int8" and (reason := registry.get("cpu").int8_refusal()) is not None:
        raise InputError(f"--dtype int8: {reason}; measure bfloat16 or float32")
    if options.nodes < 2:
        raise InputError(
            f"{options.nodes} nodes were given; a model has DISCO structure for at least 2"
        )
    if not 0.0 <= options.density < 1.0:
        raise InputError(
            f"a density of {options.density:g} was given; it is at least 0 and below 1, where "
            "nothing would be skipped"
        )
    for what, value in (
        ("threads", options.threads),
        ("batch", options.batch),
        ("rounds", options.rounds),
    ):
        if value < 1:
            raise InputError(f"--{what} {value} was given; at least 1 is needed")
    if options.threads > available_cores():
        raise InputError(
            f"--threads {options.threads} was given, and there are {available_cores()} cores: "
            "threads that share a core measure the scheduler"
        )


def _start(options: ThroughputOptions, kind: str, folder: Path) -> LocalEngine:
    weights = "sparse.safetensors" if kind.startswith("compiled") else "dense.safetensors"
    return LocalEngine(
        kind,
        source=options.source,
        name=options.model,
        weights=folder / weights,
        nodes=options.nodes,
        pattern=None,
        image_size=options.image_size,
        threads=options.threads,
        batch=options.batch,
        start_timeout_s=_START_TIMEOUT_S,
    )


def _plan(model: nn.Module, recipe: Recipe) -> Plan:
    return api.partition(model, (recipe.example_input,), nodes=recipe.nodes).plan


def _about_weights(options: ThroughputOptions) -> str:
    if options.weights is None:
        return f"random weights of seed {options.seed}"
    return f"the weights of {options.weights}"
