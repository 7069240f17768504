"""The main job on a real photograph: make, cut, run on the nodes, compare, measure."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from disco import api
from disco.bench.classes import Guess, is_logits, top_classes
from disco.bench.compare import Comparison, Reference, compare, whole_model
from disco.bench.lineup import LABELS, Lineup
from disco.bench.machine import describe_machine
from disco.bench.report import DemoResult
from disco.errors import InputError
from disco.images import Preprocessing, default_photograph, load_image
from disco.partition.plan import Plan
from disco.recipe import Recipe
from disco.runtime import RunResult
from disco.zoo import save_weights, weights_digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoOptions:
    """What the user chose. `keep` is a folder for the shards and weights; None throws them away."""

    source: str = "torchvision"
    model: str = "resnet50"
    image: Path | None = None
    weights: Path | None = None
    seed: int = 0
    density: float = 0.2
    nodes: int = 2
    rounds: int = 8
    image_size: int = 224
    keep: Path | None = None


def run_demo(options: DemoOptions, say: Say) -> DemoResult:
    """Run the demonstration.

    Args:
        options: what to do.
        say: takes progress, a line at a time.

    Raises:
        InputError: before any work, for what can be checked before.
    """
    _check(options)
    image = options.image or default_photograph()
    recipe = _recipe(options)
    x = load_image(image, recipe.preprocessing)

    say(f"[1/6] {options.source} {options.model} with {_about_weights(options)}")
    model = recipe.build_dense(options.weights)
    dense = whole_model(model, x)
    with _folder(options.keep) as folder:
        save_weights(model, folder / "dense.safetensors")
        say(f"[2/6] the baseline: cut for {options.nodes} nodes, every channel exchanged")
        dense_plan = _save_partition(model, recipe, folder / "dense", dense_exchange=True)

        say(f"[3/6] one-shot magnitude sparsification at density {options.density:g}, then cut")
        pattern = recipe.sparsify_(model)
        assert pattern is not None
        pattern.save(folder / "sparse.pattern.json")
        save_weights(model, folder / "sparse.safetensors")
        sparse = whole_model(model, x)
        plan = _save_partition(model, recipe, folder / "disco", dense_exchange=False)
        del model
        for path in sorted((folder / "disco").iterdir()):
            say(f"      {path.name}: {path.stat().st_size / 1e6:.2f} MB")

        say(f"[4/6] classifying {image}: {options.nodes} processes, each with its own shard")
        lineup = Lineup(
            folder,
            source=options.source,
            name=options.model,
            nodes=options.nodes,
            image_size=options.image_size,
            progress=lambda engine: say(f"      ready: {LABELS[engine]}"),
        )
        with lineup:
            run = lineup.run_nodes("two_nodes_disco", x)
            comparison = _worst(run, sparse)
            guesses = _tell(run, comparison, options, say)
            dense_run = lineup.run_nodes("two_nodes_dense", x)
            comparisons = {
                name: compare(value, dense if name == "torch_eager" else sparse)
                for name, value in lineup.run_local(x).items()
            }
            comparisons["two_nodes_dense"] = _worst(dense_run, dense)
            comparisons["two_nodes_disco"] = comparison
            say(f"[5/6] measuring: {options.rounds} rounds in which the engines take turns")
            timings = lineup.measure(
                x, options.rounds, lambda done: say(f"      round {done} of {options.rounds}")
            )
            setups = lineup.setups
    say("[6/6] done\n")
    return DemoResult(
        model=f"{options.source} {options.model}",
        weights=_about_weights(options),
        image=str(image),
        nodes=options.nodes,
        density=options.density,
        machine=describe_machine(),
        bytes_dense_planned=dense_plan.bytes_per_image,
        bytes_dense_counted=sum(dense_run.bytes_sent),
        bytes_planned=plan.bytes_per_image,
        bytes_counted=sum(run.bytes_sent),
        flops_dense=plan.flops_dense,
        flops_per_node=plan.flops_per_rank,
        weight_bytes_dense=plan.weight_bytes_dense,
        weight_bytes_per_node=plan.weight_bytes_per_rank,
        setups=setups,
        timings=timings,
        comparisons=comparisons,
        guesses=guesses,
    )


def _check(options: DemoOptions) -> None:
    if options.nodes < 2:
        raise InputError(
            f"{options.nodes} nodes were given; the demonstration splits a model over at least 2"
        )
    if not 0.0 <= options.density < 1.0:
        raise InputError(
            f"a density of {options.density:g} was given; it is at least 0 and below 1, which is "
            "the dense exchange that the demonstration measures anyway"
        )
    if options.rounds < 1:
        raise InputError(f"{options.rounds} rounds were given; at least 1 is needed")
    if options.keep is not None and options.keep.exists():
        raise InputError(f"the folder {options.keep} exists: give --keep one that does not")


def _recipe(options: DemoOptions) -> Recipe:
    return Recipe(
        source=options.source,
        name=options.model,
        nodes=options.nodes,
        seed=options.seed,
        weights_sha256=weights_digest(options.weights),
        density=options.density,
        preprocessing=Preprocessing.for_size(options.image_size),
    )


def _about_weights(options: DemoOptions) -> str:
    if options.weights is None:
        return f"random weights of seed {options.seed}"
    return f"the weights of {options.weights}"


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="disco-demo-") as folder:
        yield Path(folder)


def _save_partition(
    model: nn.Module, recipe: Recipe, folder: Path, *, dense_exchange: bool
) -> Plan:
    partitioned = api.partition(
        model, (recipe.example_input,), nodes=recipe.nodes, dense_exchange=dense_exchange
    )
    partitioned.save(folder, model_description=recipe.describe(model))
    return partitioned.plan


def _worst(run: RunResult, reference: Reference) -> Comparison:
    """Every rank has the whole output; the one that is furthest off counts."""
    found = [compare(output, reference) for output in run.outputs]
    wrong = [comparison for comparison in found if not comparison.equal]
    return wrong[0] if wrong else max(found, key=lambda comparison: comparison.max_abs_error)


def _tell(run: RunResult, comparison: Comparison, options: DemoOptions, say: Say) -> list[Guess]:
    logits: Tensor = run.outputs[0]
    guesses = top_classes(logits, 5) if is_logits(logits) else []
    for guess in guesses:
        say(f"      {guess}")
    if guesses and options.weights is None:
        say("      (the weights are random, so the classes mean nothing)")
    verdict = "equal up to rounding" if comparison.equal else "DIFFERENT"
    say(f"      against the whole model in one process: {verdict}, {comparison}")
    return guesses
