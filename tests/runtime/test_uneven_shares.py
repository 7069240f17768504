"""Three and four ranks with unequal shares: every transport gives the same bits and the planned
bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import disco
from disco import api
from disco.partition.plan import Plan
from disco.runtime import RankProcesses

SPEEDS = {3: (10.0, 20.0, 50.0), 4: (10.0, 10.0, 30.0, 50.0)}
BATCHES = (1, 3)

# One rank under mpiexec. A follower's bytes are those of its exchanges: only the leader has calls.
_RANK = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_from_launcher
folder, inputs, results = sys.argv[1:]
options = Options(transport="mpi")
with JoinedRank(folder, place_from_launcher(options), options, threads=1) as joined:
    rank, sent = joined.place.rank, 0
    if joined.leads:
        given, made = load_file(inputs), {}
        for name in sorted(given):
            answer = joined.run(given[name])
            made[name], num_bytes = answer.outputs, answer.bytes_sent
            sent += num_bytes
        save_file(made, f"{results}/outputs")
    else:
        joined.follow()
        sent = joined._transport.bytes_sent
Path(f"{results}/sent-{rank}").write_text(json.dumps(sent))
"""
_MPIEXEC = Path(sys.executable).with_name("mpiexec")
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or not (_MPIEXEC.exists() or shutil.which("mpiexec")),
    reason="mpi4py or mpiexec is not installed (pip install 'disco-kernels[mpi]')",
)


class Uneven(nn.Module):
    """A residual, a depthwise convolution, a concatenation, a classifier; 20 channels and more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, 2, 1)
        self.deep = nn.Conv2d(40, 40, 3, 1, 1, groups=40)
        self.mix = nn.Conv2d(40, 40, 1)
        self.side = nn.Conv2d(40, 20, 3, 1, 1)
        self.fc = nn.Linear(60, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.mix(torch.relu(self.deep(x))) + x)
        both = torch.cat([y, torch.relu(self.side(y))], 1)
        return self.fc(both.mean((2, 3)))


class Cut:
    """A partition for so many unequal nodes, inputs, and what one process makes of them."""

    def __init__(self, ranks: int, folder: Path) -> None:
        self.folder = folder / "out"
        torch.manual_seed(ranks)
        model, x = Uneven().eval(), torch.randn(3, 3, 24, 24)
        nodes = disco.Cluster([disco.Node(f"n{i}", speed) for i, speed in enumerate(SPEEDS[ranks])])
        example = (x[:1],)
        api.sparsify_(model, nodes, 0.3, example)
        partitioned = api.partition(model, example, nodes)
        partitioned.save(self.folder, model_description={})
        self.plan: Plan = partitioned.plan
        self.model = model
        self.inputs = {str(batch): x[:batch].clone() for batch in BATCHES}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            loaded = api.load(self.folder)
            with torch.inference_mode():
                self.expected = {name: loaded(each) for name, each in self.inputs.items()}
                whole = model(x)
        finally:
            torch.set_num_threads(threads)
        # Sums of at most 360 products, each layer's rounding below 1e-6 of its largest output.
        torch.testing.assert_close(self.expected["3"], whole, rtol=1e-5, atol=1e-5)

    def sent(self, batch: int) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.plan.bytes_matrix_for(batch))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Cut]:
    return {ranks: Cut(ranks, tmp_path_factory.mktemp("uneven")) for ranks in SPEEDS}


slow = pytest.mark.slow


@pytest.mark.parametrize("ranks", SPEEDS)
def test_shares_are_unequal(cuts: dict[int, Cut], ranks: int) -> None:
    cut = cuts[ranks]
    counts = [layer.out_counts for layer in cut.plan.layers if layer.op == "disco.partial_conv2d"]
    counts = counts or [layer.out_counts for layer in cut.plan.layers if layer.out_counts]
    assert any(min(row) < max(row) for row in counts), counts
    sent = cut.sent(1)
    assert all(sent) and len(set(sent)) > 1, sent


@pytest.mark.parametrize(
    ("ranks", "transport"),
    [
        (3, "tcp"),
        pytest.param(3, "torch", marks=slow),
        pytest.param(4, "tcp", marks=slow),
        pytest.param(4, "torch", marks=slow),
    ],
)
def test_processes_of_this_machine(cuts: dict[int, Cut], ranks: int, transport: str) -> None:
    cut = cuts[ranks]
    with RankProcesses(cut.folder, threads=1, transport=transport) as processes:
        for batch in BATCHES:
            done = processes.run(cut.inputs[str(batch)])
            assert len(done.outputs) == cut.plan.world_size
            for output in done.outputs:
                assert torch.equal(output, cut.expected[str(batch)]), "bits differ"
            assert done.bytes_sent == cut.sent(batch)
            columns = zip(*cut.plan.bytes_matrix_for(batch), strict=True)
            assert done.bytes_received == tuple(map(sum, columns))


def test_nan_in_a_tensor_is_data(cuts: dict[int, Cut]) -> None:
    """One pixel that is NaN makes every channel of its neighbourhood NaN, on every rank."""
    x = cuts[3].inputs["1"].clone()
    x[0, 0, 5, 5] = float("nan")
    with torch.inference_mode():
        assert bool(cuts[3].model(x).isnan().all())
        assert bool(api.load(cuts[3].folder)(x).isnan().all())


@needs_mpi
@pytest.mark.parametrize("ranks", [pytest.param(3, marks=slow), 4])
def test_mpi(cuts: dict[int, Cut], ranks: int, tmp_path: Path) -> None:
    cut = cuts[ranks]
    save_file(cut.inputs, tmp_path / "inputs")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    mpiexec = str(_MPIEXEC) if _MPIEXEC.exists() else "mpiexec"
    words = [str(script), str(cut.folder), str(tmp_path / "inputs"), str(tmp_path)]
    done = subprocess.run(
        [mpiexec, "-n", str(cut.plan.world_size), sys.executable, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = load_file(tmp_path / "outputs")
    for name, expected in cut.expected.items():
        assert torch.equal(outputs[name], expected), "bits differ"
    for rank in range(cut.plan.world_size):
        counted = json.loads((tmp_path / f"sent-{rank}").read_text())
        assert counted == sum(cut.sent(batch)[rank] for batch in BATCHES)
