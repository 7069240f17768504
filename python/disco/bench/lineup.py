"""Engines alive at once and measured in turns; those of `disco demo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from disco.bench.engine import LocalEngine
from disco.bench.timing import Timing, interleave
from disco.runtime import RankProcesses, RunResult
from disco.runtime.launched import Launched
from disco.runtime.rank_processes import available_cores

# A turn: untimed passes that bring an engine's weights back into the caches, then timed ones.
_WARMUP = 2
_REPEATS = 3
# Pools spin for some milliseconds after their work, on cores that the next engine needs.
_PAUSE_S = 0.05

Self = TypeVar("Self", bound="Engines")

LABELS = {
    "torch_eager": "torch eager, dense weights",
    "two_nodes_dense": "nodes, dense exchange",
    "two_nodes_disco": "nodes, DISCO",
    "swapped": "swapped model, one process",
    "compiled": "compiled model, one process",
}


@dataclass(frozen=True)
class Setup:
    """What an engine runs on: processes, threads of each, backends of its kernels."""

    processes: int
    threads: int
    backends: tuple[str, ...]


class Engines:
    """Engines alive at once, each in processes of its own. Use as a context manager.

    In processes of their own because thread pools that share the cores spin against each other;
    only one engine works at a time.

    Args:
        engines: by name, in the order of their turns.
        progress: called with an engine's name when it is ready.
    """

    def __init__(
        self, engines: Mapping[str, Launched], progress: Callable[[str], None] = lambda name: None
    ) -> None:
        self._engines = dict(engines)
        self._stack = ExitStack()
        self._progress = progress

    def __enter__(self: Self) -> Self:
        with ExitStack() as stack:
            for name, engine in self._engines.items():
                stack.enter_context(engine)
                self._progress(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, value, trace)

    def measure(self, x: Tensor, rounds: int, progress: Callable[[int], None]) -> dict[str, Timing]:
        """Latencies by engine."""

        def turn(engine: Launched) -> Callable[[int, int], list[float]]:
            return lambda warmup, repeats: engine.measure(x, warmup=warmup, repeats=repeats)

        return interleave(
            {name: turn(engine) for name, engine in self._engines.items()},
            rounds=rounds,
            repeats=_REPEATS,
            warmup=_WARMUP,
            pause_s=_PAUSE_S,
            progress=progress,
        )

    @property
    def setups(self) -> dict[str, Setup]:
        """By engine, what it runs on."""
        return {
            name: Setup(
                processes=len(engine.ready),
                threads=engine.ready[0]["threads"],
                backends=tuple(sorted({b for ready in engine.ready for b in ready["backends"]})),
            )
            for name, engine in self._engines.items()
        }


class Lineup(Engines):
    """The engines of `disco demo`: two partitions and three engines of one process each.

    Args:
        folder: with the partitions "dense" and "disco", the weights "dense.safetensors" and
            "sparse.safetensors", and "sparse.pattern.json".
        source, name: the model in the zoo.
        nodes: number of nodes.
        image_size: of the square inputs, in pixels.
        progress: called with an engine's name when it is ready.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: str,
        name: str,
        nodes: int,
        image_size: int,
        progress: Callable[[str], None],
    ) -> None:
        common: dict[str, Any] = {
            "source": source,
            "name": name,
            "nodes": nodes,
            "image_size": image_size,
            "threads": available_cores(),
        }
        sparse, pattern = folder / "sparse.safetensors", folder / "sparse.pattern.json"
        self._by_engine = {
            "two_nodes_dense": RankProcesses(folder / "dense"),
            "two_nodes_disco": RankProcesses(folder / "disco"),
        }
        self._locals = {
            "torch_eager": LocalEngine(
                "eager", weights=folder / "dense.safetensors", pattern=None, **common
            ),
            "swapped": LocalEngine("swapped", weights=sparse, pattern=pattern, **common),
            "compiled": LocalEngine("compiled", weights=sparse, pattern=None, **common),
        }
        everyone: dict[str, Launched] = {**self._by_engine, **self._locals}
        super().__init__({name: everyone[name] for name in LABELS}, progress)

    def run_nodes(self, engine: str, x: Tensor) -> RunResult:
        """One pass of "two_nodes_dense" or "two_nodes_disco"."""
        return self._by_engine[engine].run(x)

    def run_local(self, x: Tensor) -> dict[str, Any]:
        """One pass of each engine that is one process, by name."""
        return {name: engine.run(x) for name, engine in self._locals.items()}
