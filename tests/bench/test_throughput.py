"""`disco bench throughput`: the table's logic on made-up timings, and one small run of all."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from disco import api, commands
from disco.bench import throughput
from disco.bench.compare import Comparison, compare, whole_model, worst
from disco.bench.dense_engines import MAKERS, why_missing
from disco.bench.lineup import Setup
from disco.bench.throughput import DENSE_ENGINES, choose_engines, flops_of
from disco.bench.throughput_report import DISCO, Flops, ThroughputResult
from disco.bench.timing import Timing
from disco.cli import main
from disco.errors import InputError
from disco.zoo import build_model
from disco_kernels.backends.cpu import extension_status

ROW = {"engine", "median_ms", "p10_ms", "p90_ms", "images_per_s", "max_abs_error"}
SUMMARY = {
    "best_dense_engine",
    "best_dense_ms",
    "disco_ms",
    "speedup_vs_best_dense",
    "flop_ratio",
    "peak_gflops_measured",
    "achieved_gflops",
}


def made_up(**changes: Any) -> ThroughputResult:
    """DISCO at 5 ms a batch of 2; dense engines at 9 and 8 ms."""
    times = {"slow": (9.0, 9.0, 30.0), "fast": (7.0, 8.0, 9.0), DISCO: (4.0, 5.0, 6.0)}
    result = ThroughputResult(
        model="torchvision small",
        weights="random weights of seed 0",
        nodes=2,
        density=0.2,
        threads=2,
        batch=2,
        image_size=32,
        dtype="float32",
        timings={name: Timing(samples) for name, samples in times.items()},
        setups={name: Setup(1, 2, ("torch",)) for name in times},
        comparisons={name: Comparison(1e-6, 1e-5, 1.0) for name in times},
        skipped={"absent": "not installed"},
        gathered=("conv1",),
        packed_bytes=4096,
        flops=Flops(dense=8_000_000, disco=5_000_000),
        peak_gflops=4.0,
        machine={
            "processor": "P",
            "cores": 2,
            "system": "S",
            "versions": {"torch": "2", "x": None},
        },
    )
    return replace(result, **changes)


def test_summary_is_against_the_best_dense_engine() -> None:
    result = made_up()
    assert result.problems == []
    summary = result.summary
    assert set(summary) >= SUMMARY
    assert summary["best_dense_engine"] == "fast" and summary["best_dense_ms"] == 8.0
    assert summary["disco_ms"] == 5.0
    assert summary["speedup_vs_best_dense"] == pytest.approx(1.6)
    assert summary["flop_ratio"] == pytest.approx(1.6)
    assert summary["achieved_gflops"] == pytest.approx(2 * 5e6 / 5e-3 / 1e9)
    assert summary["peak_fraction"] == pytest.approx(2.0 / (4.0 * 2))


def test_rows_and_table() -> None:
    result = made_up()
    data = json.loads(json.dumps(result.to_json()))
    rows = {row["engine"]: row for row in data["engines"]}
    assert list(rows) == ["slow", "fast", DISCO]
    assert all(set(row) >= ROW for row in rows.values())
    assert rows[DISCO]["images_per_s"] == pytest.approx(400.0)
    assert (rows["fast"]["p10_ms"], rows["fast"]["p90_ms"]) == (7.0, 9.0)
    assert data["skipped"] == {"absent": "not installed"} and data["problems"] == []
    text = str(result)
    assert "skipped: absent (not installed)" in text
    assert "1.600x the best dense engine (fast)" in text
    assert "busy" in text, "the slow engine's p90 is far above its median"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gathered": ()}, "skips anything"),
        ({"comparisons": {DISCO: Comparison(2e-5, 1e-5, 1.0)}}, "disco differs"),
        ({"comparisons": {"fast": Comparison(float("nan"), 1e-5, 1.0)}}, "fast differs"),
        ({"comparisons": {"fast": Comparison(0.0, 1e-5, 1.0, False)}}, "other shapes"),
        ({"setups": {"fast": Setup(1, 1, ("torch",))}}, "1 threads instead of 2"),
    ],
)
def test_worthless_numbers_are_a_failure(
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = made_up()
    merged = {
        key: value if not isinstance(value, dict) else {**getattr(good, key), **value}
        for key, value in changes.items()
    }
    monkeypatch.setattr(commands, "run_throughput", lambda *args: made_up(**merged))
    assert main(["bench", "throughput"]) == 1
    assert "FAILED: " in (printed := capsys.readouterr().out) and message in printed


def test_engines_not_installed_are_skipped_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons = {"openvino": "openvino not installed"}
    monkeypatch.setattr(throughput, "why_missing", reasons.get)
    chosen, skipped = choose_engines(None)
    assert list(chosen) == [*(e for e in DENSE_ENGINES if e != "openvino"), DISCO]
    assert skipped == reasons
    assert choose_engines(["onnxruntime", "disco"]) == (
        {"onnxruntime": "onnxruntime", DISCO: "compiled"},
        {},
    )
    with pytest.raises(InputError, match="openvino not installed"):
        choose_engines(["openvino"])


@pytest.mark.parametrize(
    "args",
    [
        ("--engines", "tensorrt"),
        ("--engines", "disco"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--batch", "0"),
        ("--rounds", "0"),
        ("--nodes", "1"),
        ("--density", "1"),
        ("--dtype", "bfloat16", "--engines", "onnxruntime"),
        ("--engines", "openvino_bf16"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("disco: error: ") and error.count("\n") == 1


def test_without_the_extension_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = replace(extension_status(), error="not built")
    monkeypatch.setattr(throughput, "extension_status", lambda: status)
    assert main(["bench", "throughput"]) == 2
    assert "not there to be measured: not built" in capsys.readouterr().err


def test_flops_count_layers_that_run_dense_as_dense() -> None:
    model = build_model("torchvision", "resnet18")
    x = torch.zeros(1, 3, 32, 32)
    api.sparsify_(model, 2, 0.2, (x,))
    plan = api.partition(model, (x,), nodes=2).plan
    compiled = api.compile(model, nodes=2, example_inputs=(x,))
    values = {layer.value for layer in plan.layers}
    assert compiled.gathered and set(compiled.gathered) <= values
    none, some, every = (flops_of(plan, g) for g in ((), compiled.gathered[:1], compiled.gathered))
    assert none.disco == none.dense == plan.flops_dense
    assert none.disco > some.disco > every.disco > plan.flops_dense / 2


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k == "inductor" else k for k in MAKERS],
)
def test_a_dense_engine_computes_the_model(kind: str, tmp_path: Path) -> None:
    reason = why_missing(kind)
    if reason is not None:
        pytest.skip(reason)
    # An engine sets these for its whole process, which here is that of the other tests, too.
    config = importlib.import_module("torch._inductor.config")
    kept = {name: getattr(config, name) for name in ("freezing", "compile_threads")}
    model = build_model("torchvision", "resnet18")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dtype = torch.float32
    for engines, other in (
        (throughput.BF16_ENGINES, torch.bfloat16),
        (throughput.INT8_ENGINES, torch.int8),
    ):
        dtype = other if kind in engines.values() else dtype
    reference = whole_model(model, x, dtype=dtype)
    with config.patch(kept):
        engine = MAKERS[kind](model, x, str(tmp_path))
        with torch.inference_mode():
            comparison = compare(engine.function(x), reference)
    assert comparison.equal, comparison
    assert engine.threads == torch.get_num_threads()


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    engines = ["torch_eager_nchw"]
    engines += [e for e in ("onnxruntime",) if why_missing(DENSE_ENGINES[e]) is None]
    code = main(
        [
            *("bench", "throughput", "--model", "resnet18", "--image-size", "32"),
            *("--rounds", "1", "--batch", "2", "--engines", ",".join(engines)),
            *("--json", str(path)),
        ]
    )
    assert code == 0
    data = json.loads(path.read_text())
    assert [row["engine"] for row in data["engines"]] == [*engines, DISCO]
    assert all(row["median_ms"] > 0 and row["threads"] == 1 for row in data["engines"])
    assert data["summary"]["best_dense_engine"] in engines
    assert 1.3 < data["summary"]["flop_ratio"] < 2.0 and data["layers_gathered"] > 10
    assert data["packed_bytes"] > 1e6
    assert data["summary"]["peak_gflops_measured"] > 0
    assert {"date", "command", "processor", "versions"} <= set(data["machine"])


def test_every_dtype_has_its_own_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "why_missing", lambda kind: None)
    in_float32, _ = choose_engines(None, "float32")
    in_bfloat16, _ = choose_engines(None, "bfloat16")
    assert set(in_float32) & set(in_bfloat16) == {DISCO}
    assert (in_float32[DISCO], in_bfloat16[DISCO]) == ("compiled", "compiled_bf16")
    in_int8, _ = choose_engines(None, "int8")
    assert set(in_float32) & set(in_int8) == {DISCO} and in_int8[DISCO] == "compiled_int8"
    with pytest.raises(InputError, match="dense engines in bfloat16 are openvino_bf16"):
        choose_engines(["torch_compile"], "bfloat16")


def test_an_unknown_dtype_is_refused() -> None:
    options = throughput.ThroughputOptions(dtype="float16")
    with pytest.raises(InputError, match="--dtype is float32, bfloat16, int8, given 'float16'"):
        throughput.run_throughput(options, print)


def test_bfloat16_is_compared_with_torchs_own_error_in_bfloat16() -> None:
    model = build_model("torchvision", "resnet18")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = whole_model(model, x, dtype=torch.bfloat16)
    compiled = api.compile(model, nodes=2, example_inputs=(x,), dtype=torch.bfloat16)
    found = compiled(x)
    assert compare(found, reference).equal
    assert not compare(found, whole_model(model, x)).equal, "was not computed in bfloat16"
    wrong = found.roll(1, dims=1)
    assert not compare(wrong, reference).equal


def test_int8_is_further_off_than_bfloat16_and_not_wrong() -> None:
    model = build_model("torchvision", "resnet18")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reference = whole_model(model, x, dtype=torch.int8)
    compiled = api.compile(
        model, nodes=2, example_inputs=(x,), dtype=torch.int8, backend="reference"
    )
    found = compiled(x)
    assert compare(found, reference).equal
    assert not compare(found, whole_model(model, x)).equal, "was not computed in integers"
    assert not compare(found.roll(1, dims=1), reference).equal


def test_the_worst_comparison_is_reported() -> None:
    near, far = Comparison(1e-6, 1e-5, 1.0), Comparison(0.5, 2.0, 9.0)
    shapes = Comparison(float("nan"), 1e-5, 1.0, False)
    assert worst([near, far]) is far and worst([far, near, shapes]) is shapes
    assert worst([near, Comparison(float("nan"), 1.0, 1.0)]).equal is False


@torch.no_grad()
def test_an_engine_that_ignores_its_input_is_noticed() -> None:
    """By the half input, in every dtype, whatever the model makes of noise."""
    model = build_model("torchvision", "resnet18")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    constant = model(x)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        references = [whole_model(model, given, dtype=dtype) for given in (x, 0.5 * x)]
        assert not worst(compare(constant, reference) for reference in references).equal
