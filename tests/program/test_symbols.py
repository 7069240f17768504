"""Symbolic sizes: evaluated over an allow-list, never executed."""

from __future__ import annotations

import pytest

from disco.errors import InputError
from disco.program import evaluate_dim, evaluate_shape
from disco.program.symbols import first_failing, solve_dim, symbols_of


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (7, 7),
        ("s0", 5),
        ("4*s0", 20),
        ("s0 + s1 - 1", 6),
        ("(s0 - 1)//2 + 1", 3),
        ("-s1", -2),
        ("s0**2", 25),
        ("Max(1, s0)", 5),
        ("Mod(s0, s1)", 1),
        ("FloorDiv(s0, 2)", 2),
        ("Eq(Mod(s0, 2), 1)", 1),
        ("Ne(s0, 5)", 0),
        ("(s0 - 1)//2 + 1 > 3", 0),
        ("s1 <= 2", 1),
        ("(s0 > 1) & (s1 > 5)", 0),
        ("(s0 > 1) | (s1 > 5)", 1),
        ("~(s0 > 1)", 0),
    ],
)
def test_expressions(expression: int | str, value: int) -> None:
    assert evaluate_dim(expression, {"s0": 5, "s1": 2}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "s0 +",
        "__import__('os')",
        "s0.real",
        "[s0]",
        "9**9**9",
        "Max(1, *s0)",
        "s0 if s0 else 1",
        "1.5",
        "'a'",
        "1 < s0 < 9",
        "s0 is 5",
        "s0//(s0 - 5)",
    ],
)
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(InputError):
        evaluate_dim(expression, {"s0": 5})


def test_an_unknown_symbol_is_named() -> None:
    with pytest.raises(InputError, match="uses symbol 's9'; known symbols: s0"):
        evaluate_dim("s9", {"s0": 1})


def test_symbols_of_a_shape() -> None:
    assert symbols_of(("4*s1", 3, "Max(s0, s1)")) == ("s1", "s0")
    assert evaluate_shape(("4*s1", 3), {"s1": 2}) == (8, 3)


@pytest.mark.parametrize(
    ("dim", "size", "found"),
    [
        ("32*s1", 96, {"s1": 3}),
        ("32*s1", 97, {}),
        ("s1 + s0 - 2", 9, {"s1": 6}),
        ("s0", 5, {}),
        ("s1*s2", 6, {}),
        ("Max(1, 2)*s1", 0, {"s1": 0}),
    ],
)
def test_one_unknown_symbol_is_solved_for(dim: str, size: int, found: dict[str, int]) -> None:
    assert solve_dim(dim, size, {"s0": 5}) == found


def test_the_first_condition_that_fails() -> None:
    conditions = ("s1 >= 9", "Eq(Mod(s1, 32), 0)")
    assert first_failing(conditions, {"s1": 64}) is None
    assert first_failing(conditions, {"s1": 65}) == "Eq(Mod(s1, 32), 0)"
    assert first_failing(conditions, {"s1": 8}) == "s1 >= 9"
