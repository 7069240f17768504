"""Nested outputs and tensors on their way between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disco.runtime.messages import (
    by_number,
    flatten,
    load_tensors,
    read_message,
    save_tensors,
    unflatten,
)


def test_nested_outputs_survive(tmp_path: Path) -> None:
    a, b, c = torch.randn(2, 3), torch.arange(4), torch.zeros(0, 2)
    value = {"out": (a, [b]), "aux": {"list": c, "none": None, "scale": 2.5}}
    tensors: list[torch.Tensor] = []
    template = flatten(value, tensors)
    save_tensors(str(tmp_path / "t"), tensors)
    back = unflatten(template, load_tensors(str(tmp_path / "t")))
    assert isinstance(back["out"], tuple) and isinstance(back["out"][1], list)
    assert torch.equal(back["out"][0], a) and torch.equal(back["out"][1][0], b)
    assert back["aux"]["list"].shape == (0, 2)
    assert back["aux"]["none"] is None and back["aux"]["scale"] == 2.5


def test_more_than_ten_tensors_keep_their_order(tmp_path: Path) -> None:
    save_tensors(str(tmp_path / "t"), [torch.tensor(i) for i in range(23)])
    assert [int(t) for t in load_tensors(str(tmp_path / "t"))] == list(range(23))


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="tensors, constants, dicts, lists and tuples"):
        flatten({"a": object()}, [])


@pytest.mark.parametrize("line", ["", "nonsense", "[1]"])
def test_what_is_no_message_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        read_message(line)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    """The same tensor twice, parts of one, and none at all in it."""
    x = torch.arange(12.0).reshape(3, 4)
    given = [x, x, x[:2], x[:, 1:], x.t(), torch.empty(0), torch.empty(0)]
    path = str(tmp_path / "t.safetensors")
    save_tensors(path, given)
    for found, expected in zip(load_tensors(path), given, strict=True):
        assert torch.equal(found, expected)
    assert by_number(given)["0"].data_ptr() == x.data_ptr(), "not copied without need"
