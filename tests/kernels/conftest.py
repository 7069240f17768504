"""What the kernel tests share: every uninitialised tensor is NaN, so an element that a kernel
forgets to write shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from disco_kernels.backends.cpu import extension_status


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.get_deterministic_debug_mode()
    # Not use_deterministic_algorithms, which takes a second to import what it does not need here.
    torch.set_deterministic_debug_mode("error")
    assert bool(torch.empty(8).isnan().all())
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _isa(record_testsuite_property: object) -> None:
    """Which instruction set ran, for the test that runs the others in processes of their own."""
    assert callable(record_testsuite_property)
    record_testsuite_property("isa", extension_status().isa or "none")


def pytest_report_header() -> str:
    status = extension_status()
    return f"disco_kernels: isa {status.isa}, extension {status.path or status.error}"
