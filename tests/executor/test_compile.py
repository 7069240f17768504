"""`disco.compile`: the whole model on one machine, exact, in a new module."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import disco
import disco_kernels
from disco.errors import InputError
from disco.executor import Executor
from disco.partition import decide
from disco.partition.one_machine import one_machine_program
from disco.program import Program, Ref, interpret
from disco_kernels import BackendUnavailable, Ownership, registry
from disco_kernels.backends.cpu import extension_status
from tests.kernels.process import python
from tests.partition.harness import Case


class Small(nn.Module):
    """Convolutions with batch norms, a residual, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = torch.relu(self.mix(nn.functional.silu(self.depthwise(x))) + x)
        return {"logits": self.head(x.mean((2, 3))), "map": x}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Small().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def test_it_is_in_evaluation_and_can_be_called_before_it_is_needed(model: nn.Module) -> None:
    compiled = disco.compile(model, 2, example_inputs=(X,))
    assert not compiled.training and not disco.partition(model, (X,), 2).training
    assert disco_kernels.precompile(compiled, (X,), (1, 3)).batches == (1, 3)


X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _check(compiled: nn.Module, model: nn.Module, batch: int) -> None:
    x = torch.randn(batch, 3, 12, 12)
    exact = copy.deepcopy(model).double()(x.double())
    result = compiled(x)
    assert list(result) == list(exact)
    for name, value in exact.items():
        error, scale = float((result[name] - value).abs().max()), float(value.abs().max())
        limit = 16 * torch.finfo(torch.float32).eps * scale
        assert error <= limit, f"{name}: {error:.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("density", [None, 0.2])
@torch.no_grad()
def test_compiled_is_exact(model: nn.Module, density: float | None, backend: str | None) -> None:
    if density is not None:
        disco.sparsify_(model, 2, density, (X,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = disco.compile(model, 2, example_inputs=(X,), backend=backend)
    for batch in (1, 2, 5):
        _check(compiled, model, batch)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    names = set(compiled.kernel_backends.values())
    assert len(names) == 1 and backend in (None, *names), "the depthwise convolution, too"


@torch.no_grad()
def test_copies_and_threads(model: nn.Module) -> None:
    disco.sparsify_(model, 2, 0.2, (X,))
    compiled = disco.compile(model, 2, example_inputs=(X,))
    modules = [compiled, copy.deepcopy(compiled)] * 4
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda job: _check(job[0], model, job[1]),
                zip(modules, [1, 1, 3, 3] * 2, strict=True),
            )
        )


@torch.no_grad()
def test_later_changes_to_the_model_do_not_reach_it(model: nn.Module) -> None:
    compiled = disco.compile(model, 2, example_inputs=(X,))
    before = compiled(X)["logits"]
    for parameter in model.parameters():
        parameter.fill_(7.0)
    for buffer in model.buffers():
        buffer.fill_(3)
    assert torch.equal(compiled(X)["logits"], before)


def test_an_unknown_backend_is_refused(model: nn.Module) -> None:
    with pytest.raises(BackendUnavailable, match="abacus"):
        disco.compile(model, 2, example_inputs=(X,), backend="abacus")


@pytest.mark.parametrize(
    ("zeros", "kinds"),
    [
        (0.0, ["disco.conv2d", "disco.conv2d", "disco.linear"]),
        (1.0, ["disco.conv2d", "disco.gather_conv2d", "disco.gather_linear"]),
    ],
)
def test_layers_with_a_pattern_are_gathered(zeros: float, kinds: list[str]) -> None:
    """Over the layers' own ownership, which need not be contiguous."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 8, 8, kernel=(3, 3), padding=(1, 1))
    case.op("aten.mean.dim", "m", Ref("b"), (2, 3))
    case.linear("c", "m", 6, 8)
    owned = Ownership(((7, 1, 2, 4), (0, 3, 5, 6)))
    outputs = {"a": owned, "b": owned, "c": Ownership.contiguous(6, 2)}
    if zeros:
        for name, out in (("b.weight", owned), ("c.weight", outputs["c"])):
            for i, j in ((0, 1), (1, 0)):
                rows = torch.tensor(out.channels[i])[:, None]
                case.weights[name][rows, torch.tensor(owned.channels[j])] = 0.0
    decisions = decide(case.program(), case.weights, {}, 2, out_ownership=outputs)
    program, _ = one_machine_program(decisions)
    assert [op.kind for op in program.ops if op.kind.startswith("disco.")] == kinds

    x = case.input(3)
    expected = interpret(case.program(), case.weights, (x,))
    read = Program.from_json(program.to_json())
    result = Executor(read, case.weights, backend="reference")(x)
    assert float((result - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


class Residual(nn.Module):
    """A small ResNet: a strided stem with pooling, three blocks, one of which shrinks the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a = nn.ModuleList(
            [
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.Conv2d(16, 32, 3, 2, 1),
                nn.Conv2d(32, 32, 3, 1, 1),
            ]
        )
        self.b = nn.ModuleList([nn.Conv2d(n, n, 3, 1, 1) for n in (16, 32, 32)])
        self.down = nn.Conv2d(16, 32, 1, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        for number, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            x = torch.relu(b(torch.relu(a(x))) + (self.down(x) if number == 1 else x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(2)
    return Residual().eval()


@torch.no_grad()
def _errors(compiled: nn.Module, model: nn.Module, own: torch.dtype) -> tuple[float, float]:
    """The largest difference from float64: of three calls, and of torch itself in `own`."""
    x = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()(x.double())
    results = [compiled(x) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].dtype == torch.float32
    torchs = copy.deepcopy(model).to(own)(x.to(own))
    floor = torch.finfo(own).eps * float(exact.abs().max())
    return float((results[0] - exact).abs().max()), max(float((torchs - exact).abs().max()), floor)


@pytest.mark.parametrize("density", [None, 0.25])
@pytest.mark.parametrize("winograd", ["off", "f2", "f4", "auto"])
def test_winograd_rounds_and_no_more(
    residual: nn.Module, winograd: str, density: float | None
) -> None:
    model, x = copy.deepcopy(residual), torch.randn(1, 3, 64, 64)
    if density is not None:
        disco.sparsify_(model, 2, density, (x,))
    compiled = disco.compile(model, 2, example_inputs=(x,), winograd=winograd)
    for _ in range(2):
        error, own = _errors(compiled, model, torch.float32)
        # F(4x4) multiplies by up to 8 on the way in and out of a tile.
        assert error <= (32 if winograd in ("f4", "auto") else 8) * own


def test_winograd_within_a_budget(residual: nn.Module) -> None:
    """The budget holds, what fits is used, and the result is that of the algorithms chosen."""
    x = torch.randn(1, 3, 64, 64)

    def compiled(winograd: str = "auto", limit: int | None = None) -> disco.Compiled:
        return disco.compile(
            residual, 2, example_inputs=(x,), winograd=winograd, packed_bytes=limit
        )

    free, direct = compiled(), compiled("off")
    assert set(direct.algorithms.values()) == {"off"} and "f2" in free.algorithms.values()
    assert direct.packed_bytes < free.packed_bytes
    between = (direct.packed_bytes + free.packed_bytes) // 2
    for limit in (direct.packed_bytes, between, free.packed_bytes - 1):
        found, again = compiled(limit=limit), compiled(limit=limit)
        assert direct.packed_bytes <= found.packed_bytes <= limit
        assert found.algorithms == again.algorithms != free.algorithms
        assert torch.equal(found(x), again(x))
        error, own = _errors(found, residual, torch.float32)
        assert error <= 32 * own
    assert compiled(limit=direct.packed_bytes).algorithms == direct.algorithms
    assert compiled(limit=free.packed_bytes).algorithms == free.algorithms
    with pytest.raises(InputError, match="need at least"):
        compiled(limit=direct.packed_bytes - 1)
    # Asked for by name, an algorithm is not given up.
    with pytest.raises(InputError, match="need at least"):
        compiled("f4", limit=direct.packed_bytes)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("density", [None, 0.25])
def test_bfloat16_is_as_close_as_torchs(
    residual: nn.Module, density: float | None, backend: str | None
) -> None:
    model, x = copy.deepcopy(residual), torch.randn(1, 3, 64, 64)
    if density is not None:
        disco.sparsify_(model, 2, density, (x,))
    off = "off" if backend else "auto"
    compiled = disco.compile(
        model, 2, example_inputs=(x,), dtype=torch.bfloat16, winograd=off, backend=backend
    )
    error, own = _errors(compiled, model, torch.bfloat16)
    assert error <= 4 * own
    exact = disco.compile(model, 2, example_inputs=(x,), winograd="off")
    assert error > 16 * _errors(exact, model, torch.float32)[0], "was not computed in bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"winograd": "f6"}, "winograd is one of off, f2, f4, auto, given 'f6'"),
        ({"winograd": None}, "winograd is one of .*, given None"),
        ({"winograd": True}, "winograd is one of .*, given True"),
        ({"dtype": torch.float16}, "torch.bfloat16 or torch.int8, given torch.float16"),
        ({"dtype": torch.uint8}, "torch.bfloat16 or torch.int8, given torch.uint8"),
        ({"dtype": "bfloat16"}, "torch.bfloat16 or torch.int8, given bfloat16"),
        ({"packed_bytes": 0}, "packed_bytes must be a whole number, 1 or more; given 0"),
        ({"packed_bytes": True}, "packed_bytes must be a whole number"),
        ({"packed_bytes": float("nan")}, "packed_bytes must be a whole number"),
        ({"packed_bytes": "5"}, "packed_bytes must be a whole number"),
        ({"packed_bytes": 1000}, "need at least [0-9]+ bytes, and 1000 are allowed"),
    ],
)
def test_bad_options_are_refused(
    model: nn.Module, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        disco.compile(model, 2, example_inputs=(X,), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("winograd", ["f2", "f4"])
def test_winograd_that_a_backend_has_not_is_refused(model: nn.Module, winograd: str) -> None:
    with pytest.raises(InputError, match=f"no Winograd, asked for '{winograd}'"):
        disco.compile(model, 2, example_inputs=(X,), winograd=winograd, backend="reference")


HAS_INT8 = not (extension_status().error or registry.get("cpu").int8_refusal())


@pytest.mark.parametrize("density", [None, 0.25])
@torch.no_grad()
def test_int8_backends_agree_and_are_close(residual: nn.Module, density: float | None) -> None:
    """The layers that pay multiply integers, on both backends, with the examples' ranges."""
    model, x = copy.deepcopy(residual), torch.randn(2, 3, 64, 64)
    if density is not None:
        disco.sparsify_(model, 2, density, (x,))
    exact = copy.deepcopy(model).double()(x.double())
    scale = float(exact.abs().max())
    found = {}
    for backend in ("reference", "cpu") if HAS_INT8 else ("reference",):
        compiled = disco.compile(
            model, 2, example_inputs=(x,), dtype=torch.int8, backend=backend, winograd="auto"
        )
        assert set(compiled.algorithms.values()) <= {"int8", "off", "f2", "f4"}
        assert sum(kind == "int8" for kind in compiled.algorithms.values()) >= 8
        found[backend] = compiled(x)
        assert torch.equal(found[backend], compiled(x)) and found[backend].dtype == torch.float32
        error = float((found[backend] - exact).abs().max())
        # Layers here are few: the inputs and weights of each are off by 1 in 256 of their ranges.
        assert error <= 0.05 * scale
        plain = disco.compile(model, 2, example_inputs=(x,), dtype=torch.bfloat16, backend=backend)
        assert not torch.equal(plain(x), found[backend]), "was not computed in integers"
    if HAS_INT8:
        # They round the same integers; only bfloat16 between the layers may differ, and move one.
        difference = float((found["cpu"] - found["reference"]).abs().max())
        assert difference <= 0.02 * scale


@torch.no_grad()
def test_int8_clips_what_the_examples_did_not_show(model: nn.Module) -> None:
    compiled = disco.compile(model, 2, example_inputs=(X,), dtype=torch.int8, backend="reference")
    ten, thousand = (compiled(factor * X.abs().max() * torch.ones_like(X)) for factor in (1, 1000))
    assert torch.equal(ten["map"], thousand["map"]), "the first layer's inputs end at the range"


@torch.no_grad()
def test_int8_leaves_layers_that_are_too_wide_as_they_are() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(65600, 16), nn.Linear(16, 16)).eval()
    x = torch.randn(2, 656, 100)
    compiled = disco.compile(model, 1, example_inputs=(x,), dtype=torch.int8, backend="reference")
    assert list(compiled.algorithms.values()) == ["off", "int8"]
    assert compiled(x).isfinite().all()


def test_int8_is_refused_where_it_does_not_pay() -> None:
    code = """
import torch, disco
from disco_kernels import BackendUnavailable
try:
    x = torch.randn(2, 32)
    disco.compile(torch.nn.Linear(32, 32), 1, example_inputs=(x,), dtype=torch.int8)
except BackendUnavailable as error:
    print(error)
"""
    for isa in set(extension_status().available_isas) & {"avx2", "neon"}:
        done = python("-c", code, environment={"DISCO_KERNELS_ISA": isa})
        assert "cannot multiply 8-bit integers: that takes AVX-512-VNNI" in done.stdout, done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_needs_finite_examples(model: nn.Module, value: float) -> None:
    with pytest.raises(InputError, match="give examples whose values stay finite"):
        disco.compile(
            model,
            2,
            example_inputs=(torch.full_like(X, value),),
            dtype=torch.int8,
            backend="reference",
        )
