"""What each command of `disco` does with its parsed arguments. Called by `disco.cli`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import disco_kernels as dk
from disco import api
from disco.bench.demo import DemoOptions, run_demo
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


def partition(args: argparse.Namespace) -> None:
    """`disco partition`."""
    check_target(args.out, args.overwrite)  # before the work, not after it
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
        name=args.model,
        nodes=(2 if args.nodes is None else args.nodes) if cluster is None else cluster.world_size,
        seed=args.seed,
        weights_sha256=weights_digest(args.weights),
        density=args.density,
        preprocessing=Preprocessing.for_size(args.image_size),
        cluster=cluster,
        group_size=args.group_size,
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


def verify(args: argparse.Namespace) -> bool:
    """`disco verify`; False if an output differs or bytes are not as planned."""
    check_json(args.json)
    processes = _processes(args)
    description = processes.manifest.model
    recipe = Recipe.from_description(description, args.directory)
    images = find_images(args.input)
    for image in images:
        load_image(image, recipe.preprocessing)
    model = rebuild(description, args.directory, args.weights)
    with processes:
        checks = verify_images(processes, model, images, recipe.preprocessing, say)
    failed = [check for check in checks if not check.passed]
    say(f"{len(checks) - len(failed)} of {len(checks)} images equal up to rounding")
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
