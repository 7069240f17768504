"""A small model cut for two ranks, for tests that start processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from disco import api
from disco.executor import Executor, InProcessHub, run_together
from disco.partition.shards import load_shard

SIZE = 24
THREE = 3


class Tiny(nn.Module):
    """Convolutions with odd channel counts, a stride, a residual, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 13, 3, 2, 1, bias=False), nn.BatchNorm2d(13))
        self.a = nn.Sequential(nn.Conv2d(13, 18, 3, 1, 1, bias=False), nn.BatchNorm2d(18))
        self.b = nn.Sequential(nn.Conv2d(18, 13, 1, bias=False), nn.BatchNorm2d(13))
        self.fc = nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.fc(x.mean((2, 3)))


def _tiny(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tiny()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    """The whole model with DISCO structure for two ranks at density 0.3."""
    model = _tiny(0)
    api.sparsify_(model, 2, 0.3, (torch.zeros(1, 3, SIZE, SIZE),))
    return model


@pytest.fixture(scope="session")
def tiny_input() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], Path]:
    """Partition a model for two ranks into a new folder."""

    def cut_model(model: nn.Module) -> Path:
        folder = tmp_path_factory.mktemp("cut") / "out"
        example = (torch.zeros(1, 3, SIZE, SIZE),)
        api.partition(model, example, nodes=2).save(folder, model_description={})
        return folder

    return cut_model


@pytest.fixture(scope="session")
def tiny_folder(cut: Callable[[nn.Module], Path], tiny: nn.Module) -> Path:
    """`tiny` partitioned. Do not change it: copy it."""
    return cut(tiny)


@pytest.fixture(scope="session")
def other_folder(cut: Callable[[nn.Module], Path]) -> Path:
    """Another plan of the same architecture: nothing is zero, everything is exchanged."""
    return cut(_tiny(1))


@pytest.fixture(scope="session")
def three_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module, tiny_input: Tensor
) -> Path:
    """`tiny` for three ranks; beside it `given.safetensors`: an input `x`, and the output `y`."""
    path = tmp_path_factory.mktemp("three") / "out"
    api.partition(tiny, (tiny_input,), nodes=THREE).save(path, model_description={})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        output = api.load(path)(tiny_input)
    torch.set_num_threads(threads)
    save_file({"x": tiny_input, "y": output}, path.parent / "given.safetensors")
    return path


@pytest.fixture(scope="session")
def survivable(
    tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module, tiny_input: Tensor
) -> Path:
    """A survivable partition, and beside it an input and what it comes to without any ranks."""
    path = tmp_path_factory.mktemp("three") / "out"
    api.partition(tiny, (tiny_input,), nodes=THREE, survivable=True).save(path, {})
    shards = [load_shard(path, rank) for rank in range(THREE)]
    executors = [Executor(shard.program, shard.weights) for shard in shards]
    outputs = {"x": tiny_input}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for count in range(THREE):
        for lost in itertools.combinations(range(THREE), count):
            transports = InProcessHub(THREE).transports()
            for transport in transports:
                transport.lost = frozenset(lost)
            left = [rank for rank in range(THREE) if rank not in lost]
            with torch.inference_mode():
                found = run_together(
                    [executors[rank] for rank in left],
                    (tiny_input,),
                    [transports[rank] for rank in left],
                )
            outputs[".".join(["y", *map(str, lost)])] = found[0].clone()
    torch.set_num_threads(threads)
    assert not torch.equal(outputs["y"], outputs["y.1"])
    save_file(outputs, path.parent / "given.safetensors")
    return path
