"""Latencies of several engines, taken in turns so that a slow spell of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Latencies of one engine in ms."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.samples_ms)

    @property
    def low_ms(self) -> float:
        """The 10th percentile."""
        return self._percentile(0.1)

    @property
    def high_ms(self) -> float:
        """The 90th percentile."""
        return self._percentile(0.9)

    def _percentile(self, part: float) -> float:
        ordered = sorted(self.samples_ms)
        return ordered[round(part * (len(ordered) - 1))]


def interleave(
    engines: Mapping[str, Callable[[int, int], list[float]]],
    *,
    rounds: int,
    repeats: int,
    warmup: int,
    pause_s: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Timing]:
    """Let the engines take turns.

    Args:
        engines: by name a function from (warmup, repeats) to `repeats` latencies in ms.
        rounds: turns that each engine gets.
        repeats, warmup: timed and untimed passes of a turn. The untimed ones bring an engine's
            weights back into the caches.
        pause_s: before every turn, so that the last engine's threads stop spinning and sleep.
        progress: called with the number of finished rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in engines}
    for done in range(rounds):
        for name, measure in engines.items():
            time.sleep(pause_s)
            samples[name] += measure(warmup, repeats)
        progress(done + 1)
    return {name: Timing(tuple(values)) for name, values in samples.items()}
