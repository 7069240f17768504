"""Symbolic sizes: small integer expressions such as "s0", "4*s0" or "(s0 - 1)//2 + 1".

They come from the shapes of a captured model and are kept as text, so that a program stays plain
JSON. They are evaluated by walking Python's syntax tree over an allow-list; nothing is executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence

from disco.errors import InputError

_COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    # Of conditions, which are 0 or 1.
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilToInt": int,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Eq": operator.eq,
    "Ne": operator.ne,
}
# Exponents beyond this are no sizes of tensors; evaluating them could take for ever.
_LARGEST_EXPONENT = 8


def evaluate_dim(dim: int | str, symbols: Mapping[str, int]) -> int:
    """The size that `dim` stands for.

    Args:
        dim: a number, or an expression of `symbols`.
        symbols: a value for every symbol; one that is missing raises InputError.
    """
    if isinstance(dim, int):
        return dim
    try:
        tree = ast.parse(dim, mode="eval").body
    except SyntaxError as error:
        raise InputError(
            f"size {dim!r} is no integer expression of symbols ({error.msg})"
        ) from None
    try:
        return _evaluate(tree, dim, symbols)
    except ZeroDivisionError:
        given = ", ".join(f"{name} = {value}" for name, value in symbols.items())
        raise InputError(f"size {dim!r} divides by zero with {given}") from None


def solve_dim(dim: str, size: int, symbols: Mapping[str, int]) -> dict[str, int]:
    """The value of the one unknown symbol in ``dim`` that makes it ``size``; {} if there is none.

    Args:
        dim: linear in that symbol ("s1", "32*s1", "s1 + 2").
        symbols: those that are known.
    """
    unknown = [name for name in symbols_of((dim,)) if name not in symbols]
    if len(unknown) != 1:
        return {}
    name = unknown[0]
    at = [evaluate_dim(dim, {**symbols, name: value}) for value in (1, 2)]
    slope = at[1] - at[0]
    value = 1 + (size - at[0]) // slope if slope else 1
    fits = evaluate_dim(dim, {**symbols, name: value}) == size
    return {name: value} if fits else {}


def first_failing(conditions: Sequence[str], symbols: Mapping[str, int]) -> str | None:
    """The first condition ("s1 >= 9", "Eq(Mod(s1, 32), 0)") that does not hold, or None."""
    return next((text for text in conditions if not evaluate_dim(text, symbols)), None)


def evaluate_shape(shape: Sequence[int | str], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """`evaluate_dim` over a shape."""
    return tuple(evaluate_dim(dim, symbols) for dim in shape)


def symbols_of(shape: Sequence[int | str]) -> tuple[str, ...]:
    """Names of the symbols in a shape, in order of appearance, each once."""
    found: dict[str, None] = {}
    for dim in shape:
        if isinstance(dim, str):
            names = (n.id for n in ast.walk(ast.parse(dim, mode="eval")) if isinstance(n, ast.Name))
            found.update((name, None) for name in names if name not in _FUNCTIONS)
    return tuple(found)


def _evaluate(node: ast.AST, text: str, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in symbols:
            known = ", ".join(sorted(symbols)) or "none"
            raise InputError(f"size {text!r} uses symbol {node.id!r}; known symbols: {known}")
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _evaluate(node.left, text, symbols), _evaluate(node.right, text, symbols)
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _evaluate(node.left, text, symbols), _evaluate(node.right, text, symbols)
        if 0 <= exponent <= _LARGEST_EXPONENT:
            return int(base**exponent)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, text, symbols)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return int(not _evaluate(node.operand, text, symbols))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left = _evaluate(node.left, text, symbols)
        right = _evaluate(node.comparators[0], text, symbols)
        return int(_COMPARE[type(node.ops[0])](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return int(function(*(_evaluate(a, text, symbols) for a in node.args)))
    raise InputError(f"size {text!r} is no integer expression of symbols: {ast.unparse(node)!r}")
