"""Small digits, settings for them, and one thread, on which results are the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disco.train import TrainConfig
from tests.tasks.small_data import write_digits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 figures of ten classes, as `--data`."""
    path = write_digits(tmp_path_factory.mktemp("data") / "digits.csv.gz")
    return f"digits:{path}"


class Settings:
    """Makes settings of a small, quick run."""

    def __init__(self, data: str) -> None:
        self._data = data

    def __call__(self, **changed: Any) -> TrainConfig:
        usual: dict[str, Any] = {
            "data": self._data,
            "model": "resnet8_thin",
            "epochs": 2,
            "batch_size": 16,
            "warmup_epochs": 0.2,
            "method": "dense",
            "density": 0.25,
        }
        return TrainConfig(**{**usual, **changed})


@pytest.fixture
def settings(digits: str) -> Settings:
    return Settings(digits)


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "x"
