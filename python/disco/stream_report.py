"""What `disco run` says of its images, one by one and all together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from disco.answers import write_answer
from disco.bench.classes import is_logits, top_classes
from disco.command_output import say
from disco.errors import InputError
from disco.runtime import RunResult
from disco.runtime.accounts import covered_ns
from disco.runtime.profile import Profile, Profiled

# A trace of more would be slow to open, and shows nothing new.
MOST_PROFILED = 16


@dataclass
class StreamReport:
    """Results as they come.

    Attributes:
        top: classes to show.
        profile: gets the timelines of the first results that have some.
        outputs: a folder for the answers, or None.
        images: per good image its result, for JSON.
        refused: per bad one why.
        seconds: from the first image's loading to the last result.
        under_way: per good image when it was, in ns.
        losses: ranks that were lost and came back.
    """

    top: int
    profile: Profile
    outputs: Path | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    under_way: list[tuple[int, int]] = field(default_factory=list)
    losses: Losses = field(default_factory=lambda: Losses())

    def add(self, path: Path, result: RunResult | InputError) -> None:
        """Say and keep the next one. InputError if its answer cannot be written."""
        if isinstance(result, InputError):
            say(f"{path}: {result}")
            self.refused.append({"image": str(path), "error": str(result)})
            return
        found: dict[str, Any] = {
            "image": str(path),
            "latency_ms": result.latency_ms,
            "bytes_exchanged": sum(result.bytes_sent),
            "ranks": [asdict(rank) for rank in result.ranks],
        }
        self.losses.note(result)
        found |= {"degraded": bool(result.lost), "lost_ranks": list(result.lost)}
        degraded = f", degraded: without rank {_listed(result.lost)}" if result.lost else ""
        say(f"{path}  ({result.latency_ms:.1f} ms{degraded})")
        output = result.answer
        if is_logits(output):
            guesses = top_classes(output, self.top)
            found["top"] = [vars(guess) for guess in guesses]
            for guess in guesses:
                say(f"  {guess}")
        elif self.outputs is None:
            say("  (not a classifier's output: --outputs DIR keeps it)")
        if self.outputs is not None:
            written = write_answer(self.outputs, path, output)
            found["output"] = str(written)
            say(f"  -> {written}")
        self.images.append(found)
        self.under_way.append((result.begin_ns, result.end_ns))
        if result.timelines and len(self.profile.requests) < MOST_PROFILED:
            self.profile.requests.append(Profiled(path.name, result.timelines))
            self.profile.clock_error_ns = result.clock_error_ns

    def end(self, seconds: float) -> None:
        """Say what the stream was."""
        self.seconds = seconds
        self.losses.sum_up()
        if self.images:
            latency_ms = median(image["latency_ms"] for image in self.images)
            say(
                f"{len(self.images)} images, {self.profile.in_flight} in flight: "
                f"{self.images_per_s:.1f} images/s while at least one was under way, "
                f"{self.images_per_s_loading:.1f} with their loading; median latency "
                f"{latency_ms:.1f} ms"
            )

    @property
    def images_per_s(self) -> float:
        """While at least one was under way."""
        busy_ns = covered_ns(self.under_way)
        return len(self.images) / busy_ns * 1e9 if busy_ns else 0.0

    @property
    def images_per_s_loading(self) -> float:
        """Over all the time, loading and decoding images included."""
        return len(self.images) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "in_flight": self.profile.in_flight,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "images_per_s_with_loading": self.images_per_s_loading,
            "degraded": self.losses.degraded,
            "begun_again": self.losses.retries,
            "images": self.images,
            "refused": self.refused,
        }


@dataclass
class Losses:
    """Tells of ranks that are lost and come back.

    Attributes:
        degraded: answers without some rank.
        retries: requests that were begun again.
    """

    degraded: int = 0
    retries: int = 0
    _lost: frozenset[int] = frozenset()

    def note(self, result: RunResult) -> None:
        """One answer more."""
        lost = frozenset(result.lost)
        if lost - self._lost:
            say(f"lost rank {_listed(lost - self._lost)}: going on without")
        if self._lost - lost:
            say(f"rank {_listed(self._lost - lost)} is back")
        self._lost = lost
        self.degraded += bool(lost)
        self.retries += result.retries

    def sum_up(self) -> None:
        """How many requests suffered, if any did."""
        if self.degraded or self.retries:
            say(f"{self.degraded} answers are degraded; {self.retries} requests were begun again")


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
