"""Two processes on one GPU: what they compute together, against one process and float64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import disco
from disco.executor import Executor, run_together
from disco.runtime import RankProcesses
from tests.cli.conftest import Command
from tests.cli.conftest import disco as disco_command  # noqa: F401 - a fixture
from tests.gpu.device import needs_gpu
from tests.gpu.models import NODES, SIZE, images, relative_error, sparse

pytestmark = needs_gpu
BATCHES = (2, 5)
GPU = torch.device("cuda", 0)

# Largest relative rounding of a payload: half a unit in its last place, and for int8 half a step
# of the channel's largest value.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.int8: 1 / 254,
}
# Roundings of different exchanges are independent, and on average half of the largest. On the CPU
# these models come to a fifth of what is allowed, or less.
# Of the kernels' own float32 sums: 2e-7 to 6e-7 on the CPU for these models, and a GPU's order of
# adding is another one.
FLOAT32_SUMS = 5e-6


@pytest.mark.parametrize(
    ("name", "transport", "wire"),
    [
        ("small", "tcp", torch.int8),
        ("small", "torch", torch.float16),
        ("resnet18", "tcp", torch.bfloat16),
        ("resnet18", "torch", torch.float32),
    ],
)
def test_two_ranks_on_one_gpu(tmp_path: Path, name: str, transport: str, wire: torch.dtype) -> None:
    model = sparse(name)
    parts = disco.partition(model, (images(2),), NODES, wire_dtype=wire)
    parts.save(tmp_path / "out")
    in_process = [Executor(part.program, part.weights, device=GPU) for part in parts.ranks]
    oracle = copy.deepcopy(model).double()
    most = FLOAT32_SUMS + 0.5 * math.sqrt(len(parts.plan.exchanges)) * ROUNDING[wire]
    with RankProcesses(tmp_path / "out", transport=transport, device="cuda:0") as ranks:
        assert "through pinned host memory" in ranks.carrier.text
        assert [ready["device"] for ready in ranks.ready] == ["cuda:0", "cuda:0"]
        assert [ready["backends"] for ready in ranks.ready] == [["triton"], ["triton"]]
        for batch in (*BATCHES, *BATCHES, BATCHES[0]):  # fresh, planned and bound memory
            x = images(batch)
            with torch.no_grad():
                alone = run_together(in_process, (x.to(GPU),))[0].cpu()
                exact = oracle(x.double())
            run = ranks.run(x)
            assert run.bytes_sent == tuple(sum(row) for row in parts.plan.bytes_matrix_for(batch))
            for output in run.outputs:
                assert output.device.type == "cpu"
                assert torch.equal(output, alone), relative_error(output, alone.double())
                assert relative_error(output, exact) <= most
        if transport == "tcp":  # several in flight
            xs = [images(BATCHES[0]) * scale for scale in (1.0, -1.0, 0.5, 2.0, 3.0)]
            streamed = [run.answer for run in ranks.run_stream(xs, 2)]
            one_by_one = [ranks.run(x).answer for x in xs]
            assert all(torch.equal(a, b) for a, b in zip(streamed, one_by_one, strict=True))


def test_auto_says_why_it_is_not_nccl(tmp_path: Path) -> None:
    disco.partition(sparse("small"), (images(2),), NODES).save(tmp_path / "out")
    ranks = RankProcesses(tmp_path / "out", device="cuda:0")
    assert ranks.carrier.text == (
        "tcp through pinned host memory (ranks 0 and 1 share cuda:0, which NCCL refuses)"
    )


def test_the_command(disco_command: Command, tmp_path: Path) -> None:  # noqa: F811
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    made = disco_command("partition", "resnet18", "--image-size", str(SIZE), "--out", out)
    assert made.code == 0, made.err
    gradient = Image.linear_gradient("L").resize((80, 70))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(photo)
    found = []
    for number, options in enumerate(((), ("--device", "cuda:0"))):
        result = tmp_path / f"{number}.json"
        done = disco_command("run", out, "--input", photo, "--json", result, *options)
        assert done.code == 0, done.err
        assert ("pinned" in done.out) == bool(options)
        (image,) = json.loads(result.read_text())["images"]
        found.append({guess["index"]: guess["probability"] for guess in image["top"]})
    on_cpu, on_gpu = found
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
