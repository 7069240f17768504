"""The commands that run a partition: `run`, `worker`, `doctor`; and `token` and `keys` for them.

Called by `disco.cli`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from disco.bench.classes import is_logits, top_classes
from disco.command_output import check_json, say, write_json
from disco.errors import InputError, PeerLostError
from disco.images import Preprocessing, find_images, load_image
from disco.partition.shards import load_manifest
from disco.recipe import Recipe
from disco.runtime import RankProcesses
from disco.runtime.doctor import examine
from disco.runtime.joined import (
    Answer,
    JoinedRank,
    Options,
    place_among,
    place_from_launcher,
    started_by_launcher,
)
from disco.runtime.keys import CA_KEY_FILE, make_keys
from disco.runtime.peers import Peers
from disco.runtime.tcp.meeting import name_of
from disco.runtime.token import make_token

RunOne = Callable[[Tensor], Answer]


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
    )

    def run_one(image: Tensor) -> Answer:
        done = processes.run(image)
        sent = sum(done.bytes_sent)
        return Answer(done.answer, done.latency_ms, sent, frozenset(done.lost), done.retries)

    with ExitStack() as stack:
        return _run_images(
            args, lambda: stack.enter_context(processes), run_one, processes.transport, True
        )


def _lead(args: argparse.Namespace, joined: JoinedRank) -> bool:
    with ExitStack() as stack:
        name = joined.place.transport_text
        return _run_images(args, lambda: stack.enter_context(joined), joined.run, name, False)


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
    args: argparse.Namespace,
    start: Callable[[], object],
    run_one: RunOne,
    transport: str,
    on_one_machine: bool,
) -> bool:
    """Each image in turn. A bad one is one line, and the rest go on; False if there was one.

    Args:
        args: of the command.
        start: begins what `run_one` needs.
        run_one: an image in, what it came to out.
        transport: to be named.
        on_one_machine: whether all ranks are here.
    """
    if args.input is None:
        raise InputError("--input was not given: name an image, or a folder of images")
    recipe = Recipe.from_description(load_manifest(args.directory).model, args.directory)
    preprocessing = recipe.preprocessing
    if args.image_size is not None:
        preprocessing = Preprocessing.for_size(args.image_size)
    images = find_images(args.input)
    loaded = ((path, _load(path, preprocessing)) for path in images)
    # Nothing is started for images of which none can be read.
    first = next(((path, x) for path, x in loaded if isinstance(x, Tensor)), None)
    if first is None:
        raise _none_usable(args.input, images, preprocessing)
    start()
    say(f"transport: {transport}" + (" over loopback" if on_one_machine else ""))
    run_one(first[1])  # the first pass is slow
    results: list[dict[str, Any]] = []
    losses = _Losses()
    for path in images:
        image = _load(path, preprocessing)
        try:
            if isinstance(image, InputError):
                raise image
            answer = run_one(image)
            losses.note(answer)
            results.append(_show(path, answer, args.top))
        except InputError as error:
            say(f"{path}: {error}")
    bad = len(images) - len(results)
    losses.sum_up()
    if recipe.weights_sha256 is None:
        say("(the weights are random, so the classes mean nothing)")
    if bad:
        say(f"{bad} of {len(images)} images could not be used")
    write_json(args.json, results)
    return not bad


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


class _Losses:
    """Tells of ranks that are lost and come back."""

    def __init__(self) -> None:
        self._lost: frozenset[int] = frozenset()
        self._degraded = self._retries = 0

    def note(self, answer: Answer) -> None:
        """One answer more."""
        if answer.lost - self._lost:
            say(f"lost rank {_listed(answer.lost - self._lost)}: going on without")
        if self._lost - answer.lost:
            say(f"rank {_listed(self._lost - answer.lost)} is back: answers are exact again")
        self._lost = answer.lost
        self._degraded += bool(answer.lost)
        self._retries += answer.retries

    def sum_up(self) -> None:
        """How many requests suffered, if any did."""
        if self._degraded or self._retries:
            say(f"{self._degraded} answers are degraded; {self._retries} requests were begun again")


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _show(path: Path, answer: Answer, top: int) -> dict[str, Any]:
    output = answer.outputs
    result: dict[str, Any] = {
        "image": str(path),
        "latency_ms": answer.latency_ms,
        "bytes_exchanged": answer.bytes_sent,
        "degraded": bool(answer.lost),
        "lost_ranks": sorted(answer.lost),
    }
    degraded = f", degraded: without rank {_listed(answer.lost)}" if answer.lost else ""
    say(f"{path}  ({answer.latency_ms:.1f} ms{degraded})")
    if is_logits(output):
        guesses = top_classes(output, top)
        result["top"] = [vars(guess) for guess in guesses]
        for guess in guesses:
            say(f"  {guess}")
    else:
        say("  (not a classifier's output; `disco verify` compares it)")
    return result


def _refuse(args: argparse.Namespace, option: str, value: object, why: str) -> None:
    if value is not None:
        raise InputError(f"{option} {value} was given, {why}")
