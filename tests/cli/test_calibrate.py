"""`disco calibrate`, and partitions with a wire dtype, on ResNet-18 at 32 pixels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from disco import api
from disco.bench.calibrate import WireResult, calibrate
from disco.errors import InputError
from disco.partition.shards import load_manifest
from tests.cli.conftest import MODEL, Command


def test_the_smallest_that_will_do_is_written(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    out, result = tmp_path / "narrow", tmp_path / "result.json"
    args = ("calibrate", partitioned, "--input", photo, "--out", out, "--json", result)
    done = disco(*args, "--max-error", "0.1")
    assert done.code == 0, done.err
    assert "smallest with a relative error of at most 0.1: int8" in done.out
    data = json.loads(result.read_text())
    rows = {row["wire_dtype"]: row for row in data["results"]}
    assert list(rows) == ["float32", "float16", "bfloat16", "int8"] and data["chosen"] == "int8"
    assert rows["float32"]["max_abs_error"] == 0.0 and rows["float32"]["changed_classes"] == 0
    assert 0 < rows["float16"]["relative_error"] < rows["bfloat16"]["relative_error"] < 0.1
    sizes = [row["bytes_per_image"] for row in rows.values()]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    made = load_manifest(out)
    assert made.plan.bytes_per_image == sizes[3] and made.plan.wire_dtype == "int8"
    assert made.model == load_manifest(partitioned).model
    planned = tmp_path / "planned"
    asked = disco("partition", *MODEL, "--density", "0.2", "--wire-dtype", "int8", "--out", planned)
    assert asked.code == 0, asked.err
    assert "wire dtype int8: " in disco("inspect", planned).out

    strict = disco("verify", out, "--input", photo)
    assert strict.code == 2 and "--max-error 0.01" in strict.err
    checked = disco("verify", out, "--input", photo, "--max-error", "0.1")
    assert checked.code == 0, checked.err + checked.out
    assert "1 of 1 images equal up to 0.1 of the scale" in checked.out
    assert disco("verify", out, "--input", photo, "--max-error", "1e-6").code == 1


def test_none_will_do_but_float32(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exact"
    done = disco("calibrate", partitioned, "--input", photo, "--max-error", "0", "--out", out)
    assert done.code == 0 and "at most 0: float32" in done.out, done.err
    # Nothing is narrow, so it is verified up to rounding.
    assert disco("verify", out, "--input", photo).code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-error", "-1"), "a number, 0 or more, given -1.0"),
        (("--max-error", "nan"), "a number, 0 or more, given nan"),
        (("--out", "SAME"), "is what is calibrated"),
        (("--json", "/nowhere/x.json"), "cannot be written"),
    ],
)
def test_mistakes(
    disco: Command, partitioned: Path, photo: Path, args: tuple[str, ...], message: str
) -> None:
    given = [str(partitioned) if arg == "SAME" else arg for arg in args]
    done = disco("calibrate", partitioned, "--input", photo, *given)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_an_output_that_is_no_number_is_never_exact_enough() -> None:
    row = WireResult("int8", 8, math.nan, 1.0, 1, None)
    assert not row.relative_error <= math.inf
    assert WireResult("int8", 8, 1.0, 0.0, 1, None).relative_error == math.inf
    assert WireResult("int8", 8, 0.0, 0.0, 1, None).relative_error == 0.0


def test_overflow_in_float16_is_found() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.Conv2d(4, 2, 1)).eval()
    x = torch.full((1, 1, 3, 3), 1e6)
    found = calibrate(api.partition(model, (x,), 2), [x], 0.05, lambda line: None)
    errors = {result.wire_dtype: result.relative_error for result in found.results}
    assert not errors["float16"] <= 0.05 and errors["bfloat16"] <= 0.05 and found.chosen == "int8"
    assert found.to_json()["results"][1]["relative_error"] is None
    with pytest.raises(InputError, match="at least one input"):
        calibrate(api.partition(model, (x,), 2), [], 0.05, lambda line: None)
