"""What each command of `disco` does with its parsed arguments. Called by `disco.cli`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import disco_kernels as dk
from disco import api
from disco.bench.calibrate import calibrate as calibrate_wire
from disco.bench.calibrate import check_max_error
from disco.bench.cluster import ClusterOptions, run_cluster
from disco.bench.demo import DemoOptions, run_demo
from disco.bench.lab.command import LabOptions, run_lab
from disco.bench.throughput import ThroughputOptions, run_throughput
from disco.bench.verify import verify as verify_images
from disco.command_output import check_json, say, write_json
from disco.errors import InputError
from disco.images import Preprocessing, find_images, load_image
from disco.partition import Cluster
from disco.partition.drawing import check_drawing, draw_exchange
from disco.partition.shards import check_target, load_manifest
from disco.recipe import Recipe, rebuild
from disco.runtime import RankProcesses
from disco.sparsify import check_density
from disco.training_commands import run_of
from disco.zoo import weights_digest


def demo(args: argparse.Namespace) -> bool:
    """`disco demo`; False if outputs differ or bytes are not as planned."""
    check_json(args.json)
    options = DemoOptions(
        source=args.source,
        model=args.model,
        image=args.image,
        weights=args.weights,
        seed=args.seed,
        density=args.density,
        nodes=args.nodes,
        rounds=args.rounds,
        image_size=args.image_size,
        keep=args.keep,
    )
    result = run_demo(options, say)
    say(str(result))
    write_json(args.json, result.to_json())
    for problem in result.problems:
        say(f"FAILED: {problem}")
    return not result.problems


def lab(args: argparse.Namespace) -> bool:
    """`disco lab`; leaves with the exit code of the node that failed first, if one did."""
    check_json(args.json)
    result = run_lab(
        LabOptions(
            nodes=args.nodes,
            rates=args.rate,
            delay=args.delay,
            cores=args.cores,
            loopback=args.loopback,
            keep_going=args.keep_going,
            calibrate=args.calibrate,
            command=args.command,
        )
    )
    write_json(args.json, result.to_json())
    if result.code:
        raise SystemExit(result.code)
    return True


def throughput(args: argparse.Namespace) -> bool:
    """`disco bench throughput`; False if an output is wrong or nothing was skipped."""
    check_json(args.json)
    options = ThroughputOptions(
        source=args.source,
        model=args.model,
        weights=args.weights,
        seed=args.seed,
        density=args.density,
        nodes=args.nodes,
        threads=args.threads,
        batch=args.batch,
        rounds=args.rounds,
        image_size=args.image_size,
        engines=None if args.engines is None else [e.strip() for e in args.engines.split(",")],
        dtype=args.dtype,
    )
    result = run_throughput(options, say)
    say(f"\n{result}")
    write_json(args.json, result.to_json())
    for problem in result.problems:
        say(f"FAILED: {problem}")
    return not result.problems


def cluster(args: argparse.Namespace) -> None:
    """`disco bench cluster`."""
    check_json(args.json)
    options = ClusterOptions(
        source=args.source,
        model=args.model,
        weights=args.weights,
        seed=args.seed,
        density=args.density,
        nodes=args.nodes,
        rates=[rate.strip() for rate in args.rates.split(",") if rate.strip()],
        wire_dtypes=[wire.strip() for wire in args.wire_dtypes.split(",") if wire.strip()],
        rounds=args.rounds,
        image_size=args.image_size,
        winograd=args.winograd,
    )
    result = run_cluster(options, say)
    say(f"\n{result}")
    write_json(args.json, result.to_json())


def partition(args: argparse.Namespace) -> None:
    """`disco partition`, of a model of the zoo or of a run's folder."""
    check_target(args.out, args.overwrite)  # before the work, not after it
    run = run_of(args)
    if args.group_size != 1 and args.density is None:
        raise InputError(
            f"--group-size {args.group_size} was given, which is for --density: give that too"
        )
    if args.density is not None:
        check_density(args.density)
    pattern = _find_pattern(args)
    cluster = None if args.cluster is None else Cluster.from_yaml(args.cluster)
    Cluster.of(cluster or (2 if args.nodes is None else args.nodes))
    recipe = Recipe(
        source=args.source,
        name=args.model if run is None else run.config.model_name,
        nodes=(2 if args.nodes is None else args.nodes) if cluster is None else cluster.world_size,
        seed=args.seed,
        weights_sha256=weights_digest(args.weights),
        density=args.density,
        preprocessing=Preprocessing.for_size(args.image_size) if run is None else run.preprocessing,
        cluster=cluster,
        group_size=args.group_size,
        num_classes=None if run is None else len(run.classes),
    )
    if args.weights is None:
        say(f"no --weights: random weights of seed {args.seed}")
    model = recipe.build_dense(args.weights)
    if args.density is not None:
        say(f"one-shot magnitude sparsification at density {args.density:g}, without training")
        pattern = recipe.sparsify_(model)
    partitioned = api.partition(
        model,
        (recipe.example_input,),
        cluster or recipe.nodes,
        pattern=pattern,
        dynamic_size=args.dynamic_size,
        wire_dtype=None if args.wire_dtype is None else getattr(torch, args.wire_dtype),
        survivable=args.survivable,
    )
    partitioned.save(args.out, model_description=recipe.describe(model), overwrite=args.overwrite)
    say(str(partitioned.plan))
    say("")
    for path in sorted(args.out.iterdir()):
        say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def inspect(args: argparse.Namespace) -> None:
    """`disco inspect`."""
    check_json(args.json)
    if args.draw is not None:
        check_drawing(args.draw)
    manifest = load_manifest(args.directory)
    say(str(manifest.plan))
    if args.draw is not None:
        draw_exchange(manifest.plan, args.draw)
    write_json(args.json, json.loads(manifest.plan.to_json()))


def calibrate(args: argparse.Namespace) -> bool:
    """`disco calibrate`; False if no wire dtype is within the allowed error."""
    check_json(args.json)
    check_max_error(args.max_error)
    if args.out is not None:
        if args.out.resolve() == args.directory.resolve():
            raise InputError(f"--out {args.out} is what is calibrated: give another folder")
        check_target(args.out, args.overwrite)
    manifest = load_manifest(args.directory)
    recipe = Recipe.from_description(manifest.model, args.directory)
    preprocessing = recipe.preprocessing
    if args.image_size is not None:
        preprocessing = Preprocessing.for_size(args.image_size)
    inputs = [load_image(image, preprocessing) for image in find_images(args.input)]
    partitioned = api.load(args.directory)
    with torch.inference_mode():
        result = calibrate_wire(partitioned, inputs, args.max_error, say)
    say(f"\n{result}")
    if recipe.weights_sha256 is None:
        say("(the weights are random, so this tells nothing about trained ones)")
    write_json(args.json, result.to_json())
    if result.chosen is None:
        return False
    if args.out is not None:
        chosen = api.with_wire_dtype(partitioned, getattr(torch, result.chosen))
        chosen.save(args.out, model_description=manifest.model, overwrite=args.overwrite)
        say(f"{args.out}: the same shards with payloads in {result.chosen}")
    return True


def verify(args: argparse.Namespace) -> bool:
    """`disco verify`; False if an output differs or bytes are not as planned."""
    check_json(args.json)
    if args.max_error is not None:
        check_max_error(args.max_error)
    processes = _processes(args)
    plan = processes.manifest.plan
    if args.max_error is None and any(e.is_narrow for e in plan.exchanges):
        raise InputError(
            f"payloads travel in {plan.wire_dtype} in {args.directory}, so outputs differ from the "
            "whole model's by more than rounding: say how much is allowed, as a part of the "
            "largest output, for example --max-error 0.01 (`disco calibrate` measures it)"
        )
    description = processes.manifest.model
    recipe = Recipe.from_description(description, args.directory)
    images = find_images(args.input)
    for image in images:
        load_image(image, recipe.preprocessing)
    model = rebuild(description, args.directory, args.weights)
    with processes:
        checks = verify_images(processes, model, images, recipe.preprocessing, say, args.max_error)
    failed = [check for check in checks if not check.passed]
    allowed = "rounding" if args.max_error is None else f"{args.max_error:g} of the scale"
    say(f"{len(checks) - len(failed)} of {len(checks)} images equal up to {allowed}")
    write_json(
        args.json,
        [
            {
                "image": str(check.image),
                "passed": check.passed,
                "max_abs_error_per_rank": [c.max_abs_error for c in check.comparisons],
                "tolerance": check.comparisons[0].tolerance,
                "bytes_exchanged_planned": check.bytes_planned,
                "bytes_exchanged_counted": check.bytes_counted,
            }
            for check in checks
        ],
    )
    return not failed


def _processes(args: argparse.Namespace) -> RankProcesses:
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads} was given; a process needs at least 1")
    return RankProcesses(args.directory, nodes=args.nodes, threads=args.threads)


def _find_pattern(args: argparse.Namespace) -> dk.Pattern | None:
    """The recorded pattern: the one named, or the sidecar of the weights, or none."""
    path: Path | None = args.pattern
    if path is None and args.weights is not None:
        sidecar = Path(f"{args.weights}.pattern.json")
        path = sidecar if sidecar.is_file() else None
    if path is None:
        return None
    if args.density is not None:
        raise InputError(
            f"--density {args.density:g} was given, and the weights have a recorded pattern in "
            f"{path}: leave --density out to use that, or move the pattern away"
        )
    if not path.is_file():
        raise InputError(f"there is no pattern file {path}: give one that Pattern.save wrote")
    try:
        pattern = dk.Pattern.load(path)
    except ValueError as error:
        raise InputError(f"the pattern file {path} cannot be used: {error}") from error
    say(f"recorded pattern: {path}")
    return pattern
