"""The exchange as a picture: readable files, the same for the same plan, refusals in one line."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import disco
from disco.errors import InputError
from disco.partition import Plan
from disco.partition.drawing import draw_exchange

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(11)])
    return disco.partition(model, (torch.randn(1, 3, 6, 6),), 3).plan


def test_svg_names_every_exchange_and_its_bytes(plan: Plan, tmp_path: Path) -> None:
    draw_exchange(plan, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count('<g id="axes_') == 16, "two rows of eight"
    for exchange in plan.exchanges:
        reader = (*exchange.consumers, *exchange.gathered_by)[0]
        assert f"<!-- {exchange.number}: {reader} -->" in text
    assert f"<!-- {plan.bytes_matrix[0][1] / 1e3:.1f} -->" in text
    assert "<!-- all -->" in text and "MB an image" in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_plan_gives_the_same_bytes(plan: Plan, ending: str, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        draw_exchange(plan, tmp_path / f"{name}.{ending}")
        contents.append((tmp_path / f"{name}.{ending}").read_bytes())
    assert contents[0] == contents[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a.{ending}", f"b.{ending}"]


def test_png_is_an_image_and_dense_exchange_is_darker(plan: Plan, tmp_path: Path) -> None:
    draw_exchange(plan, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000 and image.height > 300


def test_a_plan_without_exchanges_and_many_ranks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 1))
    for nodes in (1, 9):
        plan = disco.partition(model, (torch.randn(1, 3, 4, 4),), nodes).plan
        draw_exchange(plan, tmp_path / f"{nodes}.png")
        assert (tmp_path / f"{nodes}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["a.pdf", "a", "svg", "a.png.txt"])
def test_other_endings_are_refused(plan: Plan, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.png or \.svg, given"):
        draw_exchange(plan, tmp_path / name)
    with pytest.raises(InputError, match="a folder that exists"):
        draw_exchange(plan, tmp_path / "absent" / "a.png")


def test_without_matplotlib_the_extra_is_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'disco-kernels\[plot\]'") as caught:
        draw_exchange(plan, tmp_path / "a.png")
    assert "\n" not in str(caught.value)
