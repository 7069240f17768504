"""The program IR: its JSON, its validation, its allow-list, and the interpreter."""

from __future__ import annotations

import json
import math

import pytest
import torch

import disco_kernels
from disco.errors import InputError
from disco.program import (
    Dtype,
    Op,
    Program,
    Ref,
    ValueInfo,
    WeightRef,
    interpret,
    ops,
    register_op,
)
from disco.program.fused import ACTIVATIONS

IMAGE = ValueInfo(("s0", 3, 8, 8), "float32")


def _program(*ops: Op, outputs: object = None) -> Program:
    returned = outputs if outputs is not None else Ref(ops[-1].name)
    return Program(("x",), returned, ops, {"x": IMAGE})  # type: ignore[arg-type]


def _conv() -> Op:
    attributes = {
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "activation": "relu",
    }
    args = (Ref("x"), WeightRef("conv.weight"), WeightRef("conv.bias"), None)
    return Op("disco.conv2d", "y", args, attributes)


def test_activations_are_those_of_the_kernels() -> None:
    assert ACTIVATIONS == disco_kernels.ACTIVATIONS


@pytest.mark.parametrize("kind", ["disco.conv2d", "disco.partial_linear", "disco.channel_affine"])
def test_unknown_activations_are_refused(kind: str) -> None:
    """A file of a later release, perhaps: found when it is read, not in the middle of a run."""
    program = _program(Op(kind, "y", (Ref("x"),), {"activation": "mish"}))
    for attempt in (program.validate, lambda: Program.from_json(program.to_json())):
        with pytest.raises(InputError, match="'y' .* has the activation 'mish'; .* none, relu, "):
            attempt()


def test_json_round_trip_keeps_every_kind_of_argument() -> None:
    ops = (
        _conv(),
        Op("aten.masked_fill.Scalar", "m", (Ref("y"), Ref("y"), -math.inf)),
        Op("aten.clamp.default", "c", (Ref("m"), None, 6.0)),
        Op("aten.to.dtype", "d", (Ref("c"), Dtype("float64"))),
        Op("aten.cat.default", "k", ((Ref("d"), Ref("d")), 1)),
    )
    outputs = {"b": (Ref("k"), [Ref("d"), None]), "a": WeightRef("conv.bias")}
    program = _program(*ops, outputs=outputs)

    read = Program.from_json(program.to_json())

    assert read == program
    assert list(read.outputs) == ["b", "a"], "the order of a result's entries is part of it"
    assert read.to_json() == program.to_json()
    assert read.ops[2].args[2] == 6.0 and isinstance(read.ops[2].args[2], float)


def test_json_holds_no_nan_token() -> None:
    program = _program(Op("aten.clamp.default", "c", (Ref("x"), math.nan, math.inf)))
    json.loads(program.to_json(), parse_constant=lambda token: pytest.fail(f"token {token}"))


def test_text_form_names_values_weights_and_shapes() -> None:
    text = str(_program(_conv()))
    assert "x: float32['s0', 3, 8, 8]" in text
    assert "disco.conv2d(%x, @conv.weight, @conv.bias, None" in text
    assert text.endswith("return %y")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (_program(Op("os.system", "y", (Ref("x"),))), r"os\.system.*not in the allow-list"),
        (_program(Op("aten.relu_.default", "y", (Ref("x"),))), "not in the allow-list"),
        (_program(Op("aten.relu.default", "y", (Ref("z"),))), "reads 'z' before it is defined"),
        (_program(Op("aten.relu.default", "x", (Ref("x"),))), "defined twice"),
        (_program(_conv(), outputs=Ref("q")), "output 'q' is not defined"),
        (Program(("x", "x"), Ref("x"), (), {"x": IMAGE}), "listed twice"),
        (Program(("x",), Ref("x"), (), {}), "no shape and dtype"),
    ],
)
def test_validation_refuses(program: Program, message: str) -> None:
    with pytest.raises(InputError, match=message):
        program.validate()
    with pytest.raises(InputError, match=message):
        Program.from_json(program.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=99), "version 99; this release reads 1 to 2"),
        (lambda c: c.pop("ops"), "damaged program"),
        (lambda c: c.update(inputs=[3]), "damaged program"),
        (lambda c: c["ops"][0].__setitem__(2, [{"code": "x"}]), "unknown argument"),
        (lambda c: c["values"].update(x=[[1.5], "float32"]), "damaged program"),
    ],
)
def test_damaged_json_is_refused_in_one_line(change: object, message: str) -> None:
    content = json.loads(_program(_conv()).to_json())
    change(content)  # type: ignore[operator]
    with pytest.raises(InputError, match=message) as caught:
        Program.from_json(json.dumps(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"inputs": []}'])
def test_other_text_is_not_a_program(text: str) -> None:
    with pytest.raises(InputError, match="not a program"):
        Program.from_json(text)


def test_a_registered_op_is_allowed_and_runs() -> None:
    program = _program(Op("tests.triple.default", "y", (Ref("x"),)))
    with pytest.raises(InputError, match=r"register_op\('tests\.triple\.default', function\)"):
        program.validate()
    register_op("tests.triple.default", lambda x: 3 * x)
    program.validate()
    x = torch.ones(2, 3, 8, 8)
    assert torch.equal(interpret(program, {}, (x,)), 3 * x)
    with pytest.raises(InputError, match="registered already"):
        register_op("tests.triple.default", lambda x: x)


def test_interpreter_computes_the_fused_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    weights = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(4, generator=generator),
    }
    y = interpret(_program(_conv()), weights, (x,))
    expected = torch.nn.functional.conv2d(x, *weights.values(), stride=2, padding=1).relu()
    assert torch.equal(y, expected)


def test_interpreter_refuses_a_rank_program_and_wrong_inputs() -> None:
    with pytest.raises(InputError, match="run that with an Executor"):
        interpret(_program(Op("disco.exchange", "e", (Ref("x"),))), {}, (torch.ones(1),))
    with pytest.raises(InputError, match="takes 1 inputs, given 2"):
        interpret(_program(_conv()), {}, (torch.ones(1), torch.ones(1)))
    with pytest.raises(InputError, match="not the name of a torch dtype"):
        op = Op("aten.to.dtype", "y", (Ref("x"), Dtype("load")))
        interpret(_program(op), {}, (torch.ones(1),))


def test_views_work_in_any_memory_layout() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    program = _program(Op("aten.view.default", "y", (Ref("x"), (2, 192))))
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(interpret(program, {}, (strided,)), x.reshape(2, 192))


def test_every_op_of_the_list_is_an_aten_op_without_side_effects() -> None:
    for kind in sorted(ops._ATEN):
        _, name, overload = kind.split(".")
        schema = getattr(getattr(torch.ops.aten, name), overload)._schema
        if kind not in ("aten.copy.default", "aten.fill.Scalar", "aten.fill.Tensor"):
            assert not schema.is_mutable, kind
