"""The commands that run a partition: `run`, `worker`, `doctor`; and `token` and `keys` for them.

Called by `disco.cli`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from disco.answers import answers_folder
from disco.command_output import check_json, say, write_json
from disco.errors import InputError, PeerLostError
from disco.images import Preprocessing, find_images, load_image
from disco.partition.shards import load_manifest
from disco.recipe import Recipe
from disco.runtime import RankProcesses, RunResult
from disco.runtime.doctor import examine
from disco.runtime.joined import JoinedRank
from disco.runtime.keys import CA_KEY_FILE, make_keys
from disco.runtime.peers import Peers
from disco.runtime.places import Options, place_among, place_from_launcher, started_by_launcher
from disco.runtime.profile import Profile, check_profile, write_profile
from disco.runtime.streams import check_in_flight
from disco.runtime.tcp.meeting import name_of
from disco.runtime.token import make_token
from disco.stream_report import StreamReport


class RunStream(Protocol):
    """`run_stream` of `RankProcesses` and `JoinedRank`."""

    def __call__(
        self, inputs: Iterable[Tensor | InputError], in_flight: int, *, profile: bool
    ) -> Iterator[RunResult | InputError]: ...


def run(args: argparse.Namespace) -> bool:
    """`disco run`: all ranks from here, or one rank of a cluster; False if an input failed."""
    if args.top < 1:
        raise InputError(f"--top {args.top} was given; at least 1 class can be shown")
    check_json(args.json)
    if args.peers is None and not started_by_launcher():
        _refuse(args, "--rank", args.rank, "which is for a list of peers: give --peers, too")
        why = "and ranks of one machine talk over loopback, which never leaves it: leave it out"
        _refuse(args, "--tls", args.tls, why)
        return _run_here(args)
    joined = _join(args)
    if not joined.leads:
        return _follow(args, joined)
    return _lead(args, joined)


def worker(args: argparse.Namespace) -> bool:
    """`disco worker`: one rank, which takes part in what the leader runs."""
    joined = _join(args)
    if joined.leads:
        raise InputError(
            f"rank {joined.place.rank} leads, so it needs inputs: start it with `disco run`, or "
            f"name another rank with --leader, here and there"
        )
    return _follow(args, joined)


def doctor(args: argparse.Namespace) -> bool:
    """`disco doctor`; False if a pair of nodes cannot talk."""
    check_json(args.json)
    peers = Peers.from_yaml(args.peers)
    report = examine(peers, args.rank, args.token_file, args.timeout, args.tls)
    say(str(report))
    write_json(args.json, report.to_json())
    return report.healthy


def token(args: argparse.Namespace) -> None:
    """`disco token`."""
    make_token(args.file)
    say(f"{args.file}: copy it to every node, and keep it to yourself")


def keys(args: argparse.Namespace) -> None:
    """`disco keys`."""
    peers = Peers.from_yaml(args.peers)
    until = make_keys(args.directory, peers, days=args.days, overwrite=args.overwrite)
    for rank, (host, port) in enumerate(peers.addresses):
        say(f"{args.directory / f'rank-{rank}'}: for rank {rank} at {name_of((host, port))}")
    say(f"{args.directory / CA_KEY_FILE}: makes certificates that all ranks trust; keep it here")
    say(f"valid until {until:%Y-%m-%d %H:%M} UTC; copy each folder to its node, and no other")


def _run_here(args: argparse.Namespace) -> bool:
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads} was given; a process needs at least 1")
    processes = RankProcesses(
        args.directory,
        nodes=args.nodes,
        threads=args.threads,
        transport=args.transport,
        silence_s=args.deadline,
        on_peer_loss=args.on_peer_loss,
        device=args.device,
    )

    survives = args.on_peer_loss != "fail"
    with ExitStack() as stack:
        return _run_images(
            args,
            lambda: stack.enter_context(processes),
            _one_by_one(processes.run) if survives else processes.run_stream,
            f"{processes.carrier.text} over loopback"
            if not processes.carrier.nccl
            else processes.carrier.text,
        )


def _lead(args: argparse.Namespace, joined: JoinedRank) -> bool:
    def run_one(image: Tensor) -> RunResult:
        answer = joined.run(image)
        return RunResult(
            outputs=(answer.outputs,),
            bytes_sent=(answer.bytes_sent,),
            bytes_received=(),
            latency_ms=answer.latency_ms,
            lost=tuple(sorted(answer.lost)),
            retries=answer.retries,
        )

    survives = args.on_peer_loss != "fail"
    with ExitStack() as stack:
        return _run_images(
            args,
            lambda: stack.enter_context(joined),
            _one_by_one(run_one) if survives else joined.run_stream,
            joined.place.transport_text,
        )


def _one_by_one(run_one: Callable[[Tensor], RunResult]) -> RunStream:
    """Passes that are begun again by themselves where a rank is lost."""

    def run_stream(
        inputs: Iterable[Tensor | InputError], in_flight: int, *, profile: bool
    ) -> Iterator[RunResult | InputError]:
        for given in inputs:
            begin_ns = time.perf_counter_ns()
            try:
                if isinstance(given, InputError):
                    raise given
                done = run_one(given)
                yield replace(done, begin_ns=begin_ns, end_ns=time.perf_counter_ns())
            except InputError as error:
                yield error

    return run_stream


def _follow(args: argparse.Namespace, joined: JoinedRank) -> bool:
    place = joined.place
    print(
        f"rank {place.rank} of {place.world_size} over {place.transport_text}, led by rank "
        f"{joined.leader}",
        flush=True,
    )
    try:
        with joined:
            count = joined.follow()
    except PeerLostError as error:
        if args.on_peer_loss == "fail":
            raise
        # Its link may have been cut, or it was stopped: the leader takes it back.
        print(f"rank {place.rank}: {error}; trying to come back", flush=True)
        return _follow(args, _join(args))
    print(f"rank {place.rank}: {count} calls; the leader has ended", flush=True)
    return True


def _join(args: argparse.Namespace) -> JoinedRank:
    options = Options(
        transport=args.transport,
        token_file=args.token_file,
        meeting_s=args.meeting,
        silence_s=args.deadline,
        tls=args.tls,
        on_peer_loss=args.on_peer_loss,
        device=args.device,
    )
    if args.peers is None:
        if not started_by_launcher():
            raise InputError(
                "this process is one rank, and nothing says of which cluster: give --peers FILE "
                "and --rank, or start it with mpiexec or torchrun"
            )
        _refuse(args, "--rank", args.rank, "and the launcher has given it one: leave it out")
        place = place_from_launcher(options)
    else:
        if args.rank is None:
            raise InputError("--peers was given without --rank: say which of them this node is")
        place = place_among(Peers.from_yaml(args.peers), args.rank, options)
    threads = args.threads
    return JoinedRank(args.directory, place, options, threads=threads, leader=args.leader)


def _run_images(
    args: argparse.Namespace, start: Callable[[], object], run_stream: RunStream, transport: str
) -> bool:
    """A stream of images. A bad one is one line, and the rest go on; False if there was one.

    Args:
        args: of the command.
        start: begins what `run_stream` needs.
        run_stream: of `RankProcesses` or `JoinedRank`.
        transport: to be named.
    """
    if args.input is None:
        raise InputError("--input was not given: name an image, or a folder of images")
    check_profile(args.profile)
    check_in_flight(args.in_flight)
    if args.on_peer_loss != "fail" and (args.in_flight > 1 or args.profile is not None):
        raise InputError(
            f"--on-peer-loss {args.on_peer_loss} runs one image at a time and keeps no timelines: "
            f"leave --in-flight and --profile out"
        )
    manifest = load_manifest(args.directory)
    recipe = Recipe.from_description(manifest.model, args.directory)
    preprocessing = recipe.preprocessing
    if args.image_size is not None:
        preprocessing = Preprocessing.for_size(args.image_size)
    images = find_images(args.input)
    outputs = None if args.outputs is None else answers_folder(args.outputs)
    # Nothing is started for images of which none can be read.
    first = next(
        (x for path in images if isinstance(x := _load(path, preprocessing), Tensor)), None
    )
    if first is None:
        raise _none_usable(args.input, images, preprocessing)
    start()
    say(f"transport: {transport}")
    # The first pass in each memory is slow.
    for warm in run_stream([first] * 2 * args.in_flight, args.in_flight, profile=False):
        if isinstance(warm, InputError):
            raise warm
    profile = Profile(manifest.plan, transport, args.in_flight)
    report = StreamReport(args.top, profile, outputs)
    inputs = (_load(path, preprocessing) for path in images)
    begin = time.perf_counter()
    results = run_stream(inputs, args.in_flight, profile=args.profile is not None)
    for path, result in zip(images, results, strict=True):
        report.add(path, result)
    report.end(time.perf_counter() - begin)
    if recipe.weights_sha256 is None:
        say("(the weights are random, so the answers mean nothing)")
    if report.refused:
        say(f"{len(report.refused)} of {len(images)} images could not be used")
    write_json(args.json, report.to_json())
    if args.profile is not None:
        write_profile(report.profile, args.profile)
    return not report.refused


def _load(path: Path, preprocessing: Preprocessing) -> Tensor | InputError:
    """The image, or why there is none."""
    try:
        return load_image(path, preprocessing)
    except InputError as error:
        return error


def _none_usable(given: Path, images: list[Path], preprocessing: Preprocessing) -> InputError:
    """The error to raise; of several images each has had its line."""
    reasons = [str(_load(path, preprocessing)) for path in images]
    if images == [given]:
        return InputError(reasons[0])
    for path, reason in zip(images, reasons, strict=True):
        say(f"{path}: {reason}")
    return InputError(f"none of the {len(images)} images in {given} could be used: give others")


def _refuse(args: argparse.Namespace, option: str, value: object, why: str) -> None:
    if value is not None:
        raise InputError(f"{option} {value} was given, {why}")
