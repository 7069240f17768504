"""The arguments of a sparsifier, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disco.errors import InputError

GROUP_SIZES = (1, 2, 4, 8)
SCORES = ("l2", "l1", "taylor", "activation")
ALLOCATIONS = ("uniform", "global", "periodic")

# Options of the methods and of the scores that watch the training, with their defaults.
METHODS: Mapping[str, Mapping[str, float]] = {
    "magnitude": {},
    "group_lasso": {"strength": 1e-4},
    "admm": {"rho": 1e-3},
}
_SCORE_OPTIONS: Mapping[str, Mapping[str, float]] = {
    "taylor": {"decay": 0.9},
    "activation": {"decay": 0.9},
}
_ALLOCATION_OPTIONS: Mapping[str, Mapping[str, float]] = {"periodic": {"period": 2}}


@dataclass(frozen=True)
class Settings:
    """What `disco.Sparsifier` was asked for.

    Raises:
        InputError: a value that is not allowed, with those that are.
    """

    density: float
    score: str
    method: str
    allocation: str
    group_size: int
    begin_step: int
    end_step: int
    every: int
    options: Mapping[str, float]

    def __post_init__(self) -> None:
        check_density(self.density)
        check_choice("score", self.score, SCORES)
        check_choice("method", self.method, tuple(METHODS))
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_group_size(self.group_size)
        _check_steps("begin_step", self.begin_step, 0)
        _check_steps("end_step", self.end_step, 0)
        _check_steps("every", self.every, 1)
        if self.end_step < self.begin_step:
            raise InputError(
                f"end_step must not be before begin_step; given begin_step={self.begin_step}, "
                f"end_step={self.end_step}"
            )
        if self.method != "magnitude" and self.score != "l2":
            raise InputError(
                f"method {self.method!r} prunes by the norm that it works on, so its score is "
                f"'l2'; given {self.score!r}: leave score out, or take method 'magnitude'"
            )
        object.__setattr__(self, "options", self._with_defaults())

    def _with_defaults(self) -> dict[str, float]:
        known = {
            **METHODS[self.method],
            **_SCORE_OPTIONS.get(self.score, {}),
            **_ALLOCATION_OPTIONS.get(self.allocation, {}),
        }
        for name, value in self.options.items():
            if name not in known:
                raise InputError(
                    f"method {self.method!r} with score {self.score!r} and allocation "
                    f"{self.allocation!r} has no option {name!r}; its options: "
                    f"{', '.join(known) or 'none'}"
                )
            if name == "period":
                if isinstance(value, bool) or value != int(value) or value < 1:
                    raise InputError(f"period must be a whole number, 1 or more; given {value!r}")
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            limit = 1.0 if name == "decay" else math.inf
            if not number or not 0.0 <= value < limit:
                raise InputError(
                    f"{name} must be a number from 0 to below {limit:g}; given {value!r}"
                )
        return {**known, **self.options}

    def as_numbers(self) -> dict[str, float | int | str]:
        """Flat, for a checkpoint."""
        flat = {name: getattr(self, name) for name in self.__dataclass_fields__}
        options = flat.pop("options")
        return {**flat, **{f"options.{name}": float(options[name]) for name in sorted(options)}}


def check_density(density: float) -> None:
    """Raise InputError unless it is in [0, 1]."""
    if not isinstance(density, (int, float)) or not 0.0 <= density <= 1.0:
        raise InputError(
            f"density must be in [0, 1] (a share of the sender's channels), given {density!r}"
        )


def check_group_size(group_size: int) -> None:
    """Raise InputError unless channels can be chosen so many at a time."""
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise InputError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))} channels; given "
            f"{group_size!r}"
        )


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Raise InputError unless the value is one of these."""
    if given not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; given {given!r}")


def _check_steps(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number, {least} or more; given {value!r}")
