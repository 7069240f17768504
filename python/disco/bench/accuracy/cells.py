"""One cell of the table: a study, a method, a number of nodes and a seed, and how it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from disco.bench.accuracy.studies import (
    DENSE,
    FIRST,
    METHODS,
    STUDIES,
    THIN,
    THIN_FIRST,
    Method,
    Study,
)
from disco.errors import InputError
from disco.train import TrainConfig


@dataclass(frozen=True)
class Cell:
    """What is trained once. `nodes` is 1 where the training does not depend on it."""

    study_name: str
    method_name: str
    nodes: int
    seed: int

    @property
    def study(self) -> Study:
        return STUDIES[self.study_name]

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    @property
    def key(self) -> str:
        """In results, and the folder of its run."""
        return f"{self.study_name}/{self.method_name}/{self.nodes}/{self.seed}"

    @property
    def is_first(self) -> bool:
        """Whether it begins with random weights."""
        return self.method_name in (FIRST, THIN_FIRST)

    @property
    def is_thin(self) -> bool:
        """Whether its model is narrower than the study's."""
        return self.method_name in (THIN_FIRST, THIN)

    @property
    def needs(self) -> tuple[Cell, ...]:
        """The cells whose weights it begins with or imitates; they come before it."""
        return tuple(cell for cell in (self.begins_with, self.teacher) if cell is not None)

    @property
    def teacher(self) -> Cell | None:
        """The cell that it imitates."""
        return Cell(self.study_name, DENSE, 1, self.seed) if self.method.taught else None

    @property
    def begins_with(self) -> Cell | None:
        """The cell whose weights it begins with."""
        if self.is_first:
            return None
        if self.method_name == THIN:
            return Cell(self.study_name, THIN_FIRST, self.nodes, self.seed)
        return Cell(self.study_name, FIRST, 1, self.seed)

    def config(self, runs: Path, model: str | None = None) -> TrainConfig:
        """Its training.

        Args:
            runs: the folder of all runs.
            model: in place of the study's, for the thin one.
        """
        study, method = self.study, self.method
        first, teacher = (
            None if cell is None else str(runs / cell.key)
            for cell in (self.begins_with, self.teacher)
        )
        settings: dict[str, Any] = {
            **study.settings,
            **method.settings,
            "seed": self.seed,
            "split_seed": self.seed,
            "nodes": self.nodes,
            "epochs": study.first_epochs if self.is_first else study.epochs,
            "init": first,
            "teacher": teacher,
        }
        if model is not None:
            settings["model"] = model
        _check_known(settings)
        return TrainConfig(**settings)


def cells_of(studies: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells of some studies and methods, by seed, each after the one that it needs.

    Args:
        studies, methods: names; none for all.
        seeds: of training, order and division.

    Raises:
        InputError: a name that there is none of.
    """
    for given, known, what in ((studies, STUDIES, "study"), (methods, METHODS, "method")):
        for name in given:
            if name not in known:
                raise InputError(f"there is no {what} {name!r}: {', '.join(known)} can be chosen")
    found: dict[Cell, None] = {}
    for seed in seeds:
        for name in studies or STUDIES:
            for cell in _of_study(name, methods, seed):
                for needed in (*_needed(cell), cell):
                    found.setdefault(needed)
    return list(found)


def _needed(cell: Cell) -> Iterator[Cell]:
    """All that it needs, and what these need before them."""
    for needed in cell.needs:
        yield from _needed(needed)
        yield needed


def _of_study(name: str, methods: Sequence[str], seed: int) -> Iterator[Cell]:
    for nodes, own in STUDIES[name].methods.items():
        for method in own:
            if not methods or method in methods:
                yield Cell(name, method, 1 if method == DENSE else nodes, seed)


def _check_known(settings: dict[str, Any]) -> None:
    unknown = sorted(set(settings) - {f.name for f in fields(TrainConfig)})
    if unknown:
        raise AssertionError(f"a study sets {', '.join(unknown)}, which no training has")
