"""How inputs reach a program: the arguments of the model's `forward`, nested as users give them.

A program reads a flat list of tensors. A `Signature` remembers, argument by argument, where in the
nesting each of them was when the model was captured, so that a captured model is called as the
model is: by position or by name, with tuples, lists and dicts of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from disco.errors import InputError
from disco.program.ir import Output, Ref


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of the model.

    Attributes:
        name: as `forward` calls it; "inputs[0]" for the first of ``*inputs``.
        value: the nesting that was captured: a `Ref` is a tensor, anything else a constant that
            every call has to repeat.
        keyword_only: it cannot be given by position.
        optional: it may be left out, because the model's own default was captured.
    """

    name: str
    value: Output
    keyword_only: bool = False
    optional: bool = False


Signature: TypeAlias = tuple[Parameter, ...]


def flatten_inputs(
    signature: Signature,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[Tensor]:
    """The tensors of one call, in the order of the program's inputs.

    Args:
        signature: of the program; an empty one means the inputs by position.
        names: of the program's inputs.
        args, kwargs: as for the model.

    Raises:
        InputError: an argument that is missing, unknown or nested otherwise than captured.
    """
    if not signature:
        signature = tuple(Parameter(name, Ref(name)) for name in names)
    found: dict[str, Tensor] = {}
    for parameter, value in _bind(signature, args, kwargs):
        _match(parameter.value, value, parameter.name, found)
    return [found[name] for name in names]


def _bind(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Parameter, Any]]:
    """Each argument with its value in this call; those left out are what was captured."""
    positional = [p for p in signature if not p.keyword_only]
    if len(args) > len(positional):
        raise InputError(f"the model takes {_described(signature)}, given {len(args)} by position")
    given = dict(zip((p.name for p in positional), args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise InputError(f"input {name!r} is given twice, by position and by name")
        given[name] = value
    unknown = [name for name in given if all(p.name != name for p in signature)]
    if unknown:
        raise InputError(
            f"the model takes {_described(signature)}, given {unknown[0]!r}: capture it with an "
            "example of that input"
        )
    for parameter in signature:
        if parameter.name in given:
            yield parameter, given[parameter.name]
        elif not parameter.optional:
            raise InputError(
                f"the model takes {_described(signature)}, and {parameter.name!r} is missing"
            )


def _match(pattern: Output, value: Any, where: str, found: dict[str, Tensor]) -> None:
    if isinstance(pattern, Ref):
        if not isinstance(value, Tensor):
            raise InputError(f"input {where!r} must be a tensor, given {type(value).__name__}")
        found[pattern.name] = value
    elif isinstance(pattern, Mapping):
        if not isinstance(value, Mapping) or set(value) != set(pattern):
            keys = ", ".join(map(repr, pattern))
            raise InputError(f"input {where!r} must be a dict of {keys}, given {_brief(value)}")
        for key, item in pattern.items():
            _match(item, value[key], f"{where}[{key!r}]", found)
    elif isinstance(pattern, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(pattern):
            raise InputError(
                f"input {where!r} must be a {type(pattern).__name__} of {len(pattern)}, given "
                f"{_brief(value)}"
            )
        for position, (item, given) in enumerate(zip(pattern, value, strict=True)):
            _match(item, given, f"{where}[{position}]", found)
    elif isinstance(value, Tensor) or type(value) is not type(pattern) or value != pattern:
        raise InputError(
            f"input {where!r} was captured as the constant {pattern!r}, given {_brief(value)}: "
            "capture the model again for another one"
        )


def _described(signature: Signature) -> str:
    names = ", ".join(p.name for p in signature)
    return f"{len(signature)} inputs ({names})" if len(signature) != 1 else f"1 input ({names})"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
