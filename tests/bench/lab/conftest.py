"""Skips what needs a lab where there can be none, and prints why."""

from __future__ import annotations

import pytest

from disco.bench.lab import Lab, LabUnavailable


@pytest.fixture(scope="session")
def lab_rights() -> None:
    """For tests that open a lab."""
    try:
        with Lab(1, "10mbit"):
            pass
    except LabUnavailable as error:
        pytest.skip(str(error))
