"""What each command of `disco` does with its parsed arguments. Called by `disco.cli`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import disco_kernels as dk
from disco import api
from disco.bench.classes import is_logits, top_classes
from disco.bench.demo import DemoOptions, run_demo
from disco.bench.lab.command import LabOptions, run_lab
from disco.bench.throughput import ThroughputOptions, run_throughput
from disco.bench.verify import verify as verify_images
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
    _check_json(args.json)
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
    result = run_demo(options, _say)
    _say(str(result))
    _write_json(args.json, result.to_json())
    for problem in result.problems:
        _say(f"FAILED: {problem}")
    return not result.problems


def lab(args: argparse.Namespace) -> bool:
    """`disco lab`; leaves with the exit code of the node that failed first, if one did."""
    _check_json(args.json)
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
    _write_json(args.json, result.to_json())
    if result.code:
        raise SystemExit(result.code)
    return True


def throughput(args: argparse.Namespace) -> bool:
    """`disco bench throughput`; False if an output is wrong or nothing was skipped."""
    _check_json(args.json)
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
    result = run_throughput(options, _say)
    _say(f"\n{result}")
    _write_json(args.json, result.to_json())
    for problem in result.problems:
        _say(f"FAILED: {problem}")
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
        _say(f"no --weights: random weights of seed {args.seed}")
    model = recipe.build_dense(args.weights)
    if args.density is not None:
        _say(f"one-shot magnitude sparsification at density {args.density:g}, without training")
        pattern = recipe.sparsify_(model)
    partitioned = api.partition(
        model,
        (recipe.example_input,),
        cluster or recipe.nodes,
        pattern=pattern,
        dynamic_size=args.dynamic_size,
    )
    partitioned.save(args.out, model_description=recipe.describe(model), overwrite=args.overwrite)
    _say(str(partitioned.plan))
    _say("")
    for path in sorted(args.out.iterdir()):
        _say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def inspect(args: argparse.Namespace) -> None:
    """`disco inspect`."""
    _check_json(args.json)
    if args.draw is not None:
        check_drawing(args.draw)
    manifest = load_manifest(args.directory)
    _say(str(manifest.plan))
    if args.draw is not None:
        draw_exchange(manifest.plan, args.draw)
    _write_json(args.json, json.loads(manifest.plan.to_json()))


def run(args: argparse.Namespace) -> None:
    """`disco run`."""
    if args.top < 1:
        raise InputError(f"--top {args.top} was given; at least 1 class can be shown")
    _check_json(args.json)
    processes = _processes(args)
    recipe = Recipe.from_description(processes.manifest.model, args.directory)
    preprocessing = recipe.preprocessing
    if args.image_size is not None:
        preprocessing = Preprocessing.for_size(args.image_size)
    images = find_images(args.input)
    results = []
    for image in images:
        load_image(image, preprocessing)  # a bad one shows before anything is started
    with processes:
        processes.run(load_image(images[0], preprocessing))  # the first pass is slow
        for image in images:
            done = processes.run(load_image(image, preprocessing))
            result: dict[str, Any] = {
                "image": str(image),
                "latency_ms": done.latency_ms,
                "bytes_exchanged": sum(done.bytes_sent),
            }
            _say(f"{image}  ({done.latency_ms:.1f} ms)")
            output = done.outputs[0]
            if is_logits(output):
                guesses = top_classes(output, args.top)
                result["top"] = [vars(guess) for guess in guesses]
                for guess in guesses:
                    _say(f"  {guess}")
            else:
                _say("  (not a classifier's output; `disco verify` compares it)")
            results.append(result)
    if recipe.weights_sha256 is None:
        _say("(the weights are random, so the classes mean nothing)")
    _write_json(args.json, results)


def verify(args: argparse.Namespace) -> bool:
    """`disco verify`; False if an output differs or bytes are not as planned."""
    _check_json(args.json)
    processes = _processes(args)
    description = processes.manifest.model
    recipe = Recipe.from_description(description, args.directory)
    images = find_images(args.input)
    for image in images:
        load_image(image, recipe.preprocessing)
    model = rebuild(description, args.directory, args.weights)
    with processes:
        checks = verify_images(processes, model, images, recipe.preprocessing, _say)
    failed = [check for check in checks if not check.passed]
    _say(f"{len(checks) - len(failed)} of {len(checks)} images equal up to rounding")
    _write_json(
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
    _say(f"recorded pattern: {path}")
    return pattern


def _check_json(path: Path | None) -> None:
    """Refuse now what could not be written after minutes of work."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--json {path} cannot be written: give a file in a folder that exists")


def _write_json(path: Path | None, data: Any) -> None:
    if path is None:
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _say(line: str) -> None:
    print(line, flush=True)
