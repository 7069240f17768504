"""Calls of a captured model: by position and by name, nested, with constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disco.errors import InputError
from disco.program import Parameter, Program, Ref, ValueInfo, flatten_inputs

SIGNATURE = (
    Parameter("image", Ref("a")),
    Parameter("scale", 2.0, optional=True),
    Parameter("more", {"x": (Ref("b"), [Ref("c")]), "flag": True}, keyword_only=True),
)
NAMES = ("c", "a", "b")
A, B, C = (torch.full((2,), float(value)) for value in range(3))
MORE = {"flag": True, "x": [B, (C,)]}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A,), {"more": MORE}),
        ((A, 2.0), {"more": MORE}),
        ((), {"more": MORE, "scale": 2.0, "image": A}),
    ],
)
def test_tensors_come_in_the_programs_order(args: Any, kwargs: Any) -> None:
    flat = flatten_inputs(SIGNATURE, NAMES, args, kwargs)
    assert [float(x[0]) for x in flat] == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"more": MORE}, "takes 3 inputs .*, and 'image' is missing"),
        ((A,), {}, "'more' is missing"),
        ((A, 2.0, MORE), {}, "given 3 by position"),
        ((A,), {"more": MORE, "image": A}, "'image' is given twice"),
        ((A,), {"more": MORE, "mask": A}, "given 'mask': capture it with an example"),
        ((A, 3.0), {"more": MORE}, r"'scale' was captured as the constant 2\.0, given 3\.0"),
        ((A, 2), {"more": MORE}, "constant 2.0, given 2:"),
        ((A, A), {"more": MORE}, "constant 2.0, given a Tensor"),
        ((1,), {"more": MORE}, "'image' must be a tensor, given int"),
        ((A,), {"more": {"x": B}}, "must be a dict of 'x', 'flag', given a dict of 'x'"),
        (
            (A,),
            {"more": {"flag": True, "x": (B,)}},
            r"more\['x'\].* a tuple of 2, given a tuple of 1",
        ),
        ((A,), {"more": {"flag": 1, "x": (B, [C])}}, r"more\['flag'\].* constant True, given 1"),
    ],
)
def test_other_calls_are_refused(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        flatten_inputs(SIGNATURE, NAMES, args, kwargs)
    assert "\n" not in str(caught.value)


def test_without_a_signature_inputs_come_by_position_or_name() -> None:
    assert flatten_inputs((), ("x", "y"), (A,), {"y": B}) == [A, B]
    with pytest.raises(InputError, match=r"takes 2 inputs \(x, y\)"):
        flatten_inputs((), ("x", "y"), (A, B, C), {})


def test_a_program_keeps_its_signature_sizes_and_conditions() -> None:
    values = {name: ValueInfo(("s0", "s1"), "float32") for name in NAMES}
    program = Program(
        NAMES,
        Ref("a"),
        (),
        values,
        signature=SIGNATURE,
        example_sizes={"s1": 7},
        conditions=("s1 >= 3",),
    )
    program.validate()
    assert Program.from_json(program.to_json()) == program
    plain = Program(NAMES, Ref("a"), (), values)
    assert "signature" not in plain.to_json() and Program.from_json(plain.to_json()) == plain


def test_a_signature_of_other_inputs_is_refused() -> None:
    values = {"a": ValueInfo(("s0",), "float32")}
    with pytest.raises(InputError, match="the signature names"):
        Program(("a",), Ref("a"), (), values, signature=SIGNATURE).validate()
