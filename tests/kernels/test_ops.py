"""The operators that torch's dispatcher knows: opcheck, fakes, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import disco_kernels as dk
from disco_kernels._ops import SCHEMAS
from tests.kernels.cases import BACKENDS, i32, image, needs_extension

both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)
OPS: Any = torch.ops.disco_kernels
Sample = tuple[str, tuple[Any, ...]]


def narrow_samples(backend: str) -> list[Sample]:
    """Calls with segments and messages in narrow wire dtypes."""
    packed = dk.prepack(torch.randn(6, 5, 1, 1), [3, 2], backend=backend)
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1])
    int8, half = torch.int8, torch.float16
    x = image("w", 2, 3, 4, 4)
    steps = (image("p", 2, 2, 4, 4) * 40).to(int8)
    segments, none = [x, steps], [None, None]
    tokens = [torch.randn(6, 3).to(half), (torch.randn(6, 2) * 40).to(int8)]
    after = (None, None, 6, *geometry, "relu", backend)
    into = (None, *geometry, "none", backend)
    return [
        ("partial_conv2d", (segments, none, packed, *after, "off", [None, torch.rand(2, 2)])),
        ("partial_conv2d", ([x.to(half), x[:, :2].bfloat16()], none, packed, *after)),
        (
            "partial_conv2d_",
            (
                *(image("w", 2, 6, 4, 4), segments, none, packed, *into),
                *("off", [None, torch.rand(1, 2)]),
            ),
        ),
        (
            "partial_linear",
            (tokens, none, packed, None, None, 6, "none", backend, [None, torch.rand(3, 2)]),
        ),
        ("gather_pack_", (x, i32(2, 0), [1, 1], torch.empty(80, dtype=int8), backend)),
        ("gather_pack_", (x, i32(2, 0), [2], torch.empty(64, dtype=half), backend)),
    ]


def samples(backend: str) -> list[Sample]:
    """Several calls of every operator, odd shapes and layouts among them."""
    weight, matrix = torch.randn(6, 5, 3, 2), torch.randn(7, 5)
    packed = dk.prepack(weight, [3, 2], backend=backend)
    packed_matrix = dk.prepack(matrix, [3, 2], backend=backend)
    one_pixel = dk.prepack(weight[:1, :1], [1], backend=backend)
    bias, residual = torch.randn(6), image("w", 2, 6, 4, 4)
    x, nchw, payload = image("w", 2, 3, 7, 5), image("c", 2, 4, 7, 5), image("p", 2, 2, 7, 5)
    geometry = ([3, 2], [2, 1], [1, 0], [1, 1])
    nodes = torch.cat(
        [
            dk.prepack(torch.randn(2, 4, 3, 2), [4], backend=backend),
            dk.prepack(torch.randn(4, 3, 3, 2), [3], backend=backend),
        ]
    )
    node_matrices = torch.cat(
        [
            dk.prepack(torch.randn(2, 4), [4], backend=backend),
            dk.prepack(torch.randn(4, 3), [3], backend=backend),
        ]
    )
    inputs = i32(0, 1, 2, 3, 4, 3, 1)
    tokens = [torch.randn(2, 9, 3), torch.randn(2, 9, 2)]
    accumulate = ([x, payload], [None, None], packed)
    big = image("w", 2, 9, 4, 4)
    found: list[Sample] = [
        ("prepack", (weight, [3, 2], backend)),
        ("prepack", (matrix.t().contiguous().t(), [5, 0], backend)),
        ("prepack", (torch.randn(0, 4), [4], backend)),
        ("prepack", (torch.randn(4, 0, 1, 1), [0], backend)),
        ("partial_conv2d", (*accumulate, bias, residual, 6, *geometry, "relu", backend)),
        (
            "partial_conv2d",
            (
                [nchw, payload],
                [i32(3, 0, 0), None],
                packed,
                None,
                None,
                6,
                *geometry,
                "none",
                backend,
            ),
        ),
        (
            "partial_conv2d",
            (
                [image("w", 3, 1, 1, 1)],
                [None],
                one_pixel,
                None,
                None,
                1,
                [3, 2],
                [1, 1],
                [1, 1],
                [1, 1],
                "none",
                backend,
            ),
        ),
        (
            "partial_conv2d",
            (
                [image("w", 0, 3, 7, 5), image("w", 0, 2, 7, 5)],
                [None, None],
                packed,
                bias,
                None,
                6,
                *geometry,
                "none",
                backend,
            ),
        ),
        (
            "partial_conv2d_",
            (image("w", 2, 6, 4, 4), *accumulate, None, *geometry, "none", backend),
        ),
        ("partial_conv2d_", (big[:, 2:8], *accumulate, residual, *geometry, "relu", backend)),
        ("partial_linear", (tokens, [None, None], packed_matrix, None, None, 7, "relu", backend)),
        (
            "partial_linear",
            (
                [tokens[0][0, 0], tokens[1][0, 0]],
                [None, None],
                packed_matrix,
                torch.randn(7),
                torch.randn(7),
                7,
                "none",
                backend,
            ),
        ),
        (
            "partial_linear",
            (
                [torch.randn(0, 3), torch.randn(0, 2)],
                [None, None],
                packed_matrix,
                None,
                None,
                7,
                "none",
                backend,
            ),
        ),
        (
            "gather_conv2d",
            (
                image("w", 2, 5, 7, 5),
                inputs,
                [4, 3],
                [2, 4],
                None,
                nodes,
                bias,
                residual,
                *geometry,
                "relu",
                backend,
            ),
        ),
        (
            "gather_conv2d",
            (
                image("c", 1, 5, 7, 5),
                inputs,
                [4, 3],
                [2, 4],
                i32(5, 0, 1, 4, 2, 3),
                nodes,
                None,
                None,
                *geometry,
                "none",
                backend,
            ),
        ),
        (
            "gather_linear",
            (
                torch.randn(3, 2, 5),
                inputs,
                [4, 3],
                [2, 4],
                None,
                node_matrices,
                bias,
                None,
                "relu",
                backend,
            ),
        ),
        (
            "gather_linear",
            (
                torch.randn(5),
                inputs,
                [4, 3],
                [2, 4],
                i32(5, 0, 1, 4, 2, 3),
                node_matrices,
                None,
                torch.randn(6),
                "none",
                backend,
            ),
        ),
        ("gather_pack_", (image("w", 2, 5, 3, 2), inputs, [4, 0, 3], torch.empty(84), backend)),
        ("gather_pack_", (image("c", 1, 5, 3, 2), i32(4), [1], torch.empty(6), backend)),
        *narrow_samples(backend),
        *grouped_samples(backend),
    ]
    for activation in dk.ACTIVATIONS[2:]:
        arguments = (tokens, [None, None], packed_matrix, None, None, 7, activation, backend)
        found.append(("partial_linear", arguments))
    return found + (winograd_samples() if backend == "cpu" else [])


def grouped_samples(backend: str) -> list[Sample]:
    """Depthwise, and groups of several channels (of so many that they run as nodes)."""
    found: list[Sample] = []
    for layout, groups, inputs, outputs in (("w", 5, 1, 1), ("c", 3, 2, 4), ("v", 2, 1, 50)):
        weight = torch.randn(groups * outputs, inputs, 3, 2)
        packed = dk.prepack_grouped(weight, groups, backend=backend)
        x = image(layout, 2, groups * inputs, 7, 5)
        bias, residual = torch.randn(len(weight)), image("w", 2, len(weight), 4, 6)
        layer = (len(weight), groups, [3, 2], [2, 1], [1, 1], [1, 1])
        found += [
            ("prepack_grouped", (weight, groups, backend)),
            ("grouped_conv2d", (x, packed, bias, residual, *layer, "silu", backend)),
            ("grouped_conv2d", (x, packed, None, None, *layer, "none", backend)),
        ]
    return found


def winograd_samples() -> list[Sample]:
    """Calls with the two tiles of Winograd, which only the C++ kernels have."""
    weight, bias, residual = torch.randn(6, 5, 3, 3), torch.randn(6), image("w", 2, 6, 7, 5)
    x, nchw, payload = image("w", 2, 3, 7, 5), image("c", 2, 4, 7, 5), image("p", 2, 2, 7, 5)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    inputs = i32(0, 1, 2, 3, 4, 3, 1)
    found: list[Sample] = []
    for tile in ("f2", "f4"):
        packed = dk.prepack(weight, [3, 2], backend="cpu", winograd=tile)
        parts = [torch.randn(2, 4, 3, 3), torch.randn(4, 3, 3, 3)]
        nodes = torch.cat(
            [dk.prepack(w, [w.shape[1]], backend="cpu", winograd=tile) for w in parts]
        )
        last = (*geometry, "relu", "cpu", tile)
        listed = [i32(3, 0, 0), None]
        found += [
            ("prepack", (weight, [3, 2], "cpu", tile)),
            (
                "partial_conv2d",
                ([x, payload], [None, None], packed, bias, residual, 6, *last),
            ),
            ("partial_conv2d", ([nchw, payload], listed, packed, None, None, 6, *last)),
            (
                "partial_conv2d_",
                (image("w", 2, 6, 7, 5), [x, payload], [None, None], packed, residual, *last),
            ),
            (
                "gather_conv2d",
                (image("w", 2, 5, 7, 5), inputs, [4, 3], [2, 4], None, nodes, bias, None, *last),
            ),
        ]
    return found


NUM_SAMPLES = {"reference": 41, "cpu": 51}


def test_every_operator_has_samples() -> None:
    named = [schema.split("(")[0] for schema in SCHEMAS]
    counts = {name: sum(s[0] == name for s in samples("reference")) for name in named}
    assert set(counts) == {s[0] for s in samples("reference")} and min(counts.values()) >= 2


@both_backends
def test_opcheck(backend: str) -> None:
    checks = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    )
    covered = 0
    for name, arguments in samples(backend):
        result = torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}, (name, result)
        covered += 1
    assert covered == NUM_SAMPLES[backend]


@both_backends
def test_fakes_have_the_real_shapes_and_strides(backend: str) -> None:
    covered = 0
    for name, arguments in samples(backend):
        real = getattr(OPS, name)(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake_arguments = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
            fake = getattr(OPS, name)(*fake_arguments)
        if real is None:
            assert fake is None
        else:
            found = (fake.shape, fake.stride(), fake.dtype, fake.device)
            assert found == (real.shape, real.stride(), real.dtype, real.device), name
        covered += 1
    assert covered == NUM_SAMPLES[backend]


@both_backends
def test_gradients_are_refused(backend: str) -> None:
    covered = 0
    for name, arguments in samples(backend):
        if name.startswith("prepack"):  # packs the values of a Parameter, too
            continue
        for place in range(len(arguments)):
            changed = list(arguments)
            if isinstance(changed[place], list) and isinstance(changed[place][0], Tensor):
                if changed[place][0].dtype != torch.float32:
                    continue
                changed[place] = [changed[place][0].clone().requires_grad_(), *changed[place][1:]]
            elif isinstance(changed[place], Tensor) and changed[place].dtype == torch.float32:
                if name.endswith("_") and place in (0, 3):
                    continue  # a leaf that is written to is refused by torch itself
                changed[place] = changed[place].clone().requires_grad_()
            else:
                continue
            with pytest.raises(RuntimeError, match=f"{name} records no gradient"):
                getattr(OPS, name)(*changed)
            with torch.no_grad():
                getattr(OPS, name)(*changed)
            with torch.inference_mode():
                getattr(OPS, name)(*changed)
            covered += 1
    assert covered > 30


@both_backends
def test_prepared_kernels_pack_values_of_parameters(backend: str) -> None:
    """Weights and biases that require gradients, of which nothing is recorded."""
    x = image("w", 1, 4, 3, 3)
    kernel = dk.PartialConv2d(
        torch.randn(5, 4, 1, 1, requires_grad=True),
        [4],
        dk.ConvSpec(),
        bias=torch.randn(5, requires_grad=True),
        backend=backend,
    )
    assert not kernel([x]).requires_grad
    out = image("w", 1, 5, 3, 3)
    assert not kernel([x], out=out).requires_grad


@both_backends
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    local, remote = torch.randn(6, 3, 3, 3), torch.randn(6, 2, 3, 3)
    packed = [dk.prepack(w, [w.shape[1]], backend=backend) for w in (local, remote)]

    def two_passes(x: Tensor, payload: Tensor) -> Tensor:
        y = dk.partial_conv2d(
            [x], [None], packed[0], out_channels=6, kernel_size=3, padding=1, backend=backend
        )
        dk.partial_conv2d_(
            y,
            [payload],
            [None],
            packed[1],
            kernel_size=3,
            padding=1,
            activation="relu",
            backend=backend,
        )
        message = y.new_empty(y.shape[0] * y.shape[2] * y.shape[3] * 2)
        dk.gather_pack_(y, torch.tensor([5, 1], dtype=torch.int32), [2], message, backend=backend)
        return message.view(y.shape[0], y.shape[2], y.shape[3], 2)

    compiled = torch.compile(two_passes, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, 5), (3, 7), (1, 4)):
        tensors = image("w", batch, 3, size, size), image("p", batch, 2, size, size)
        assert torch.equal(compiled(*tensors), two_passes(*tensors))


@both_backends
def test_bad_input(backend: str) -> None:
    """Each mistake is a ValueError that says what was given, on every backend the same."""
    x, bias = image("w", 2, 5, 7, 5), torch.randn(6)
    weight, matrix = torch.randn(6, 5, 3, 3), torch.randn(6, 5)
    packed = dk.prepack(weight, [5], backend=backend)
    packed_matrix = dk.prepack(matrix, [5], backend=backend)
    other = "reference" if backend == "cpu" else "cpu"
    every = i32(0, 1, 2, 3, 4)
    owned_out, owned_in = dk.Ownership.contiguous(6, 2), dk.Ownership.contiguous(5, 2)
    selected = dk.find_selected(weight, owned_out, owned_in)

    def conv(
        segments: Any = None, index: Any = (None,), outputs: int = 6, **changed: Any
    ) -> Tensor:
        segments = [x] if segments is None else segments
        options = {"kernel_size": 3, "backend": backend, "packed_weight": packed, **changed}
        return dk.partial_conv2d(segments, list(index), out_channels=outputs, **options)

    def gather(
        ins: Any = (5,), outs: Any = (6,), index: Tensor = every, at: Any = None, value: Any = None
    ) -> Tensor:
        value = torch.randn(2, 5) if value is None else value
        return dk.gather_linear(
            value, index, ins, outs, packed_matrix, out_index=at, backend=backend
        )

    def prepared(weight: Tensor = weight, counts: Any = (5,), **options: Any) -> Any:
        spec = options.pop("spec", dk.ConvSpec((3, 3)))
        return dk.PartialConv2d(weight, counts, spec, backend=backend, **options)

    def add_to(out: Tensor) -> None:
        dk.partial_conv2d_(out, [x], [None], packed, kernel_size=3, backend=backend)

    Attempt = tuple[Callable[[], object], str]
    attempts: list[Attempt] = [
        # shapes
        (lambda: conv([image("w", 2, 4, 7, 5)]), "packed weights"),
        (lambda: conv([x[0]]), r"segment 0 must be \[B, C, H, W\], given 3 dimensions"),
        (lambda: conv([]), "at least one segment"),
        (lambda: conv([x, x]), "2 segments and 1 indices"),
        (lambda: conv([x, x[:1]], (None, None)), "segment 1 is"),
        (lambda: conv([x, x[:, :, 1:]], (None, None)), "segment 1 is"),
        (lambda: conv([x, x.double()], (None, None)), "segment 1 is"),
        (lambda: conv([image("w", 2, 5, 2, 5)]), "smaller than the kernel's window"),
        (lambda: conv(outputs=5), "packed weights"),
        (lambda: conv(outputs=-1), "must not be negative, given -1"),
        (lambda: conv(kernel_size=1), "packed weights"),
        (lambda: conv(bias=bias[:5]), r"bias must be \[6\]"),
        (lambda: conv(bias=bias.double()), r"bias must be \[6\] torch.float32"),
        (lambda: conv(residual=image("w", 2, 6, 4, 3)), r"residual must be \[2, 6, 5, 3\]"),
        (lambda: conv(residual=image("w", 2, 6, 5, 3).double()), "residual must be"),
        (lambda: conv([x.double()]), "convert one of them"),
        (lambda: conv(packed_weight=packed[:-1]), "packed weights"),
        (lambda: conv(packed_weight=packed.repeat(2)), "packed weights"),
        (lambda: conv(packed_weight=dk.prepack(weight, [5], backend=other)), "packed weights"),
        # geometry
        (lambda: conv(kernel_size=(3, 3, 3)), "kernel_size must be one whole number or two"),
        (lambda: conv(kernel_size=3.0), "kernel_size must be one whole number or two"),
        (lambda: conv(stride=(1.5, 1)), "stride must be one whole number or two"),
        (lambda: conv(stride=0), "stride must be at least 1"),
        (lambda: conv(dilation=0), "dilation must be at least 1"),
        (lambda: conv(padding=-1), "padding must not be negative"),
        (lambda: conv(activation="tanh"), "activation must be one of none, relu, .*given 'tanh'"),
        # indices
        (lambda: conv(index=[i32(0, 1, 2, 3, 5)]), "[Cc]hannel.*5"),
        (lambda: conv(index=[i32(0, 1, 2, 3, -1)]), "[Cc]hannel.*-1"),
        (lambda: conv(index=[torch.tensor([0, 1, 2, 3, 2**32])]), "holds channel 4294967296"),
        (lambda: conv(index=[torch.tensor([0.0, 1, 2, 3, 4])]), r"index\[0\] must be int32"),
        (lambda: conv(index=[i32(0, 1)]), "packed weights"),
        (lambda: add_to(image("w", 2, 6, 4, 3)), r"out must be \[2, 6, 5, 3\]"),
        (lambda: add_to(image("c", 2, 6, 5, 3)), "out must have a channel stride of 1"),
        (lambda: add_to(torch.zeros(6)), r"out must be \[B, O, OH, OW\], given \[6\]"),
        # splits
        (lambda: gather(ins=(4,)), "in_splits"),
        (lambda: gather(ins=(6, -1), outs=(6, 0)), "in_splits"),
        (lambda: gather(ins=(5, 0)), "one count a node, given 2 and 1"),
        (lambda: gather(outs=(5,)), "packed weights"),
        (lambda: gather(ins=(5, 0), outs=(7, -1)), "must not be negative, given -1"),
        (lambda: gather(at=i32(0, 1, 2, 3, 4)), "out_splits"),
        (lambda: gather(at=i32(0, 1, 2, 3, 4, 4)), "each of the 6 output channels exactly once"),
        (lambda: gather(at=i32(0, 1, 2, 3, 4, 6)), "exactly once"),
        (lambda: gather(at=i32(-1, 1, 2, 3, 4, 5)), "exactly once"),
        (lambda: gather(index=i32(0, 1, 2, 3, 5)), "[Cc]hannel.*5"),
        (lambda: gather(value=torch.tensor(1.0)), "x must be .*given a scalar"),
        # weights
        (lambda: dk.prepack(weight, [4], backend=backend), "K the sum of the counts"),
        (lambda: dk.prepack(weight, [6, -1], backend=backend), "K the sum of the counts"),
        (lambda: dk.prepack(weight[0], [5], backend=backend), r"weight must be \[O, K, kh, kw\]"),
        # prepared kernels
        (lambda: prepared(counts=[4]), r"weight must be \[O, 4, 3, 3\].*given \[6, 5, 3, 3\]"),
        (lambda: prepared(counts=[6, -1]), "must not be negative, given -1"),
        (lambda: prepared(weight[:, :0], []), "at least one segment"),
        (lambda: prepared(spec=dk.ConvSpec()), r"weight must be \[O, 5, 1, 1\]"),
        (lambda: prepared(bias=bias[:5]), r"bias must be \[6\]"),
        (lambda: prepared(bias=bias.double()), r"bias must be \[6\] torch.float32"),
        (lambda: prepared(index=[None, None]), "as many indices"),
        (lambda: prepared(index=[[0, 1]]), r"index\[0\] lists 2 channels, segment_channels says 5"),
        (lambda: prepared(index=[[0, 1, 2, 3, -4]]), "holds channel -4"),
        (lambda: prepared(index=[[0, 1, 2, 3, 9]])([x]), "[Cc]hannel.*9"),
        (lambda: prepared()([x, x]), "reads 1 segments, given 2"),
        (lambda: prepared()([image("w", 2, 4, 7, 5)]), "has 4 channels; .* packed for 5"),
        (lambda: prepared()([x], out=image("c", 2, 6, 5, 3)), "channel stride of 1"),
        (lambda: dk.PartialLinear(torch.zeros(5), [5], backend=backend), r"must be \[O, K\]"),
        (
            lambda: dk.GatherConv2d(
                weight, owned_out, owned_in, selected, dk.ConvSpec((3, 3)), backend=backend
            )(image("w", 1, 6, 5, 5)),
            "x must have 5 channels, given 6",
        ),
        (
            lambda: dk.GatherLinear(matrix, owned_in, owned_in, selected, backend=backend),
            "has 6 output and 5 input channels",
        ),
        (lambda: dk.ConvSpec((0, 1)), "kernel_size must be at least 1"),
    ]
    for number, (attempt, message) in enumerate(attempts):
        with pytest.raises(ValueError, match=message) as raised:
            attempt()
        assert len(str(raised.value).splitlines()) == 1, number
    assert len(attempts) == 65


@both_backends
def test_unknown_backends_are_refused(backend: str) -> None:
    with pytest.raises(dk.BackendUnavailable, match="'nonsense'"):
        dk.prepack(torch.zeros(2, 2), [2], backend="nonsense")
    packed = dk.prepack(torch.zeros(2, 2), [2], backend=backend)
    with pytest.raises(dk.BackendUnavailable, match="'nonsense'"):
        dk.partial_linear([torch.zeros(1, 2)], [None], packed, out_features=2, backend="nonsense")
    if backend == "cpu":
        with pytest.raises(dk.BackendUnavailable, match="float32 and bfloat16 only"):
            dk.prepack(torch.zeros(2, 2).double(), [2], backend=backend)
        with pytest.raises(dk.BackendUnavailable, match="float32 and bfloat16 only"):
            dk.partial_linear(
                [torch.zeros(1, 2).double()],
                [None],
                packed.double(),
                out_features=2,
                backend=backend,
            )
