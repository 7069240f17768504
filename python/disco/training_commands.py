"""What `disco train` and `disco evaluate` do with their parsed arguments. Called by `disco.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disco.bench.accuracy.command import AccuracyOptions, bench_accuracy
from disco.command_output import check_json, say, write_json
from disco.errors import InputError
from disco.partition.shards import load_manifest
from disco.recipe import Recipe
from disco.runtime import RankProcesses
from disco.train import Run, TrainConfig, evaluate_run, is_run, open_run, resume, simulated, train
from disco.train.config import parse_options
from disco.train.device import training_device
from disco.zoo import weights_digest


def train_command(args: argparse.Namespace) -> None:
    """`disco train`."""
    check_json(args.json)
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    if "method_options" in given:
        given["method_options"] = parse_options(given["method_options"])
    _use_threads(args.threads)
    if args.resume:
        result = resume(args.out, given, say, device=args.device, workers=args.workers)
    else:
        config = TrainConfig(**given)
        result = train(config, args.out, say, device=args.device, workers=args.workers)
    say(f"{result}\n{args.out}: finished; next: disco partition {args.out} --out DIR")
    write_json(args.json, result.to_json())


def evaluate_command(args: argparse.Namespace) -> None:
    """`disco evaluate`: the model, or the nodes of its partition."""
    check_json(args.json)
    run = open_run(args.run)
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} was given; at least 1 is needed")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers} was given; 0 or more can read images")
    _use_threads(args.threads)
    device = training_device(args.device)
    if args.partition is not None and device.type != "cpu":
        raise InputError(
            f"--device {args.device} is for the whole model; the nodes of a partition compute on "
            "the CPU here: leave it out"
        )

    def measured(predict: Callable[[Tensor], Any] | None) -> None:
        result = evaluate_run(
            run,
            say,
            data=args.data,
            split=args.split,
            predict=predict,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
        )
        say(f"{result.data}\n{result}")
        write_json(args.json, result.to_json())

    simulates = args.wire_dtype is not None or args.lose is not None
    if args.partition is None:
        measured(_simulated(run, args, device) if simulates else None)
        return
    if simulates:
        raise InputError(
            f"--wire-dtype and --lose simulate nodes, and {args.partition} has its own wire dtype "
            "and real nodes: leave them out, or --partition"
        )
    _check_is_of(run, args.partition)
    with RankProcesses(args.partition, threads=args.threads) as processes:
        say(f"{processes.manifest.plan.world_size} nodes over {processes.carrier.text}")
        measured(lambda inputs: processes.run(inputs).answer)


def _simulated(run: Run, args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], Any]:
    run.require_finished()
    wire, lost = args.wire_dtype or "float32", _ranks(args.lose)
    predict = simulated(run, wire, lost, device)
    without = f", without {', '.join(map(str, lost))}" if lost else ""
    say(f"{run.config.nodes} nodes, simulated: payloads in {wire}{without}")
    return predict


def _ranks(text: str | None) -> list[int]:
    """``"0,2"`` as numbers. Raises InputError."""
    try:
        return [] if text is None else [int(rank) for rank in text.split(",")]
    except ValueError:
        raise InputError(f"--lose takes ranks, as in 0 or 0,2; given {text!r}") from None


def accuracy_command(args: argparse.Namespace) -> None:
    """`disco bench accuracy`."""
    check_json(args.json)
    if args.plots is not None and not args.plots.is_dir():
        raise InputError(f"--plots {args.plots} is no folder: give one that exists")
    options = AccuracyOptions(
        json=args.json,
        runs=args.json.with_suffix(".runs") if args.runs is None else args.runs,
        plots=args.plots,
        studies=tuple(args.study),
        methods=tuple(args.method),
        seeds=args.seeds,
        device=args.device,
        jobs=args.jobs,
    )
    say(f"\n{bench_accuracy(options, say)}")


def run_of(args: argparse.Namespace) -> Run | None:
    """The run whose folder `disco partition` was given in place of a model's name, if it was.

    Its folder answers where the model and its weights are from, and for how many nodes they are;
    these become those of `args`. Raises InputError if they were given, too.
    """
    path = Path(args.model)
    if not is_run(path) and len(path.parts) < 2:
        return None
    run = open_run(path)
    run.require_finished()
    for name, usual in {
        "source": "torchvision",
        "weights": None,
        "seed": 0,
        "image_size": 224,
    }.items():
        if getattr(args, name) != usual:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)} was given, and {path} is a run "
                "of `disco train`, which says that itself: leave it out"
            )
    args.source, args.weights, args.seed = run.config.source, run.weights, run.config.seed
    if args.nodes is None and args.cluster is None:
        args.nodes = run.config.nodes
    return run


def _check_is_of(run: Run, partition: Any) -> None:
    """Refuse a partition of another model: its metric would say nothing about the run."""
    run.require_finished()
    recipe = Recipe.from_description(load_manifest(partition).model, partition)
    if recipe.weights_sha256 != weights_digest(run.weights):
        raise InputError(
            f"the partition in {partition} is not of the run in {run.path}: make one with "
            f"`disco partition {run.path} --out DIR`"
        )


def _use_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads} was given; at least 1 is needed")
    torch.set_num_threads(threads)
