"""Whether a dataclass that was read from JSON holds what its annotations say."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any, str], None]


def check_types(value: Any) -> None:
    """Raise TypeError, which names the field and what it holds, unless all fields fit.

    Annotations may be of int, float, str, bool, None, tuples, unions with None and dataclasses. An
    int is a float, a bool is no int.
    """
    kind: Any = type(value)
    _check(kind)(value, kind.__name__)


@cache
def _check(kind: Any) -> Check:
    """A check of values of one annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (_check(arg) for arg in args if arg is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is tuple:
        return _check_all(args[0]) if args[1:] == (...,) else _check_each(args)
    if is_dataclass(kind):
        return _check_fields(kind)
    allowed = (int, float) if kind is float else (kind,)

    def plain(value: Any, where: str) -> None:
        if type(value) not in allowed:
            raise TypeError(f"{where} is {value!r:.60}, where {kind.__name__} is needed")

    return plain


def _check_all(item: Any) -> Check:
    inner = _check(item)

    def check(value: Any, where: str) -> None:
        _check_tuple(value, where)
        if item is int and {*map(type, value)} <= {int}:  # lists of channels are long
            return
        for number, each in enumerate(value):
            inner(each, f"{where}[{number}]")

    return check


def _check_each(items: tuple[Any, ...]) -> Check:
    inner = [_check(item) for item in items]

    def check(value: Any, where: str) -> None:
        _check_tuple(value, where)
        if len(value) != len(inner):
            raise TypeError(f"{where} has {len(value)} entries, where {len(inner)} are needed")
        for number, (each, part) in enumerate(zip(inner, value, strict=True)):
            each(part, f"{where}[{number}]")

    return check


def _check_tuple(value: Any, where: str) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{where} is {value!r:.60}, where a list is needed")


def _check_fields(kind: Any) -> Check:
    hints = get_type_hints(kind)
    inner = {field.name: _check(hints[field.name]) for field in fields(kind)}

    def check(value: Any, where: str) -> None:
        if type(value) is not kind:
            raise TypeError(f"{where} is {value!r:.60}, where a {kind.__name__} is needed")
        for name, each in inner.items():
            each(getattr(value, name), f"{where}.{name}")

    return check
