"""Programs as JSON: the same text for the same program, floats that JSON has no form for included.

Leaves are tagged objects: {"ref": name}, {"weight": name}, {"dtype": name}, {"float": "inf"}; plain
numbers, strings, booleans and null stand for themselves; tuples are arrays. Only outputs have
nesting whose type matters, and write it out: {"tuple": [...]}, {"list": [...]}, {"dict": {...}}.
"""

from __future__ import annotations

import json
import math
from typing import Any

from disco.errors import InputError
from disco.program.ir import PROGRAM_VERSION, Dtype, Op, Program, Ref, ValueInfo, WeightRef
from disco.program.signature import Parameter


def program_to_json(program: Program) -> str:
    """One line of JSON; equal programs give equal text."""
    content = {
        "version": program.version,
        "inputs": list(program.inputs),
        "outputs": _encode_output(program.outputs),
        "ops": [
            [op.kind, op.name, _encode(op.args), {k: _encode(v) for k, v in op.kwargs.items()}]
            for op in program.ops
        ],
        "values": {name: [list(v.shape), v.dtype] for name, v in program.values.items()},
    }
    # Programs without these are as they always were.
    if program.signature:
        content["signature"] = [
            [p.name, _encode_output(p.value), p.keyword_only, p.optional] for p in program.signature
        ]
    if program.example_sizes:
        content["example_sizes"] = dict(program.example_sizes)
    if program.conditions:
        content["conditions"] = list(program.conditions)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def program_from_json(text: str) -> Program:
    """Read and validate what `program_to_json` wrote.

    Raises:
        InputError: not a program, another version, an op outside the allow-list, undefined names.
    """
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a program: {type(error).__name__} {error}") from None
    if version not in range(1, PROGRAM_VERSION + 1) or isinstance(version, bool):
        raise InputError(
            f"program of version {version!r}; this release reads 1 to {PROGRAM_VERSION}: "
            f"partition the model again, or install the release that wrote it"
        )
    try:
        program = Program(
            inputs=tuple(_text(name) for name in content["inputs"]),
            outputs=_decode_output(content["outputs"]),
            ops=tuple(_decode_op(item) for item in content["ops"]),
            values={_text(n): _decode_value(v) for n, v in content["values"].items()},
            signature=tuple(_decode_parameter(item) for item in content.get("signature", ())),
            example_sizes={_text(n): _size(v) for n, v in content.get("example_sizes", {}).items()},
            conditions=tuple(_text(c) for c in content.get("conditions", ())),
            version=version,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"damaged program: {type(error).__name__} {error}") from None
    program.validate()
    return program


def _encode(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return [_encode(item) for item in arg]
    if isinstance(arg, Ref):
        return {"ref": arg.name}
    if isinstance(arg, WeightRef):
        return {"weight": arg.name}
    if isinstance(arg, Dtype):
        return {"dtype": arg.name}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": repr(arg)}
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return arg
    raise InputError(f"a program holds references, numbers, strings and tuples; given {arg!r}")


def _decode(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_decode(part) for part in item)
    if isinstance(item, dict):
        (tag, value), *rest = item.items()
        kinds = {"ref": Ref, "weight": WeightRef, "dtype": Dtype, "float": float}
        if rest or tag not in kinds or not isinstance(value, str):
            raise ValueError(f"unknown argument {item!r}")
        return kinds[tag](value)
    return item


def _encode_output(output: Any) -> Any:
    if isinstance(output, tuple):
        return {"tuple": [_encode_output(item) for item in output]}
    if isinstance(output, list):
        return {"list": [_encode_output(item) for item in output]}
    if isinstance(output, dict):
        # Pairs, because the order of a result's entries is part of it and keys are sorted on
        # writing.
        return {"dict": [[key, _encode_output(item)] for key, item in output.items()]}
    return _encode(output)


def _decode_output(item: Any) -> Any:
    if isinstance(item, dict) and "tuple" in item:
        return tuple(_decode_output(part) for part in item["tuple"])
    if isinstance(item, dict) and "list" in item:
        return [_decode_output(part) for part in item["list"]]
    if isinstance(item, dict) and "dict" in item:
        return {_text(key): _decode_output(part) for key, part in item["dict"]}
    return _decode(item)


def _decode_op(item: Any) -> Op:
    kind, name, args, kwargs = item
    return Op(
        _text(kind), _text(name), _decode(args), {_text(k): _decode(v) for k, v in kwargs.items()}
    )


def _decode_value(item: Any) -> ValueInfo:
    shape, dtype = item
    if not all(isinstance(dim, (int, str)) for dim in shape):
        raise ValueError(f"sizes are numbers or expressions, given {shape!r}")
    return ValueInfo(tuple(shape), _text(dtype))


def _decode_parameter(item: Any) -> Parameter:
    name, value, keyword_only, optional = item
    return Parameter(_text(name), _decode_output(value), bool(keyword_only), bool(optional))


def _size(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"expected a size, given {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, given {value!r}")
    return value
