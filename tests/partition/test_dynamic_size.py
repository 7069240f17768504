"""Models whose image size is open: exact at other sizes, and a clear line where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import InputError


class Upscale(nn.Module):
    """Super-resolution: fully convolutional, a residual, pixel shuffle, up-sampling by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 10, 3, stride=2, padding=1)
        self.tail = nn.Conv2d(22, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.head(x))
        y = y + self.body(y)
        low = nn.functional.interpolate(self.down(y), size=y.shape[-2:], mode="bilinear")
        return nn.functional.pixel_shuffle(self.tail(torch.cat((y, low), 1)), 2)


class Pooled(nn.Module):
    """A classifier that takes two images of one size, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        y = torch.relu(self.conv(images["left"])) * torch.relu(self.conv(images["right"]))
        return {"logits": self.fc(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))}


def check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= 32 * torch.finfo(torch.float32).eps * scale


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 3])
def test_other_sizes_are_exact_through_save_and_load(nodes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Upscale().eval()
    example = torch.randn(1, 3, 16, 20)
    cut = disco.partition(model, (example,), nodes, dynamic_size=True)
    fixed = disco.partition(model, (example,), nodes)
    assert cut.plan.bytes_per_image == fixed.plan.bytes_per_image, "those of the example's size"
    assert not cut.plan.replicated
    cut.save(tmp_path / "out")
    loaded = disco.load(tmp_path / "out")
    fast = disco.compile(model, example_inputs=(example,), dynamic_size=True)
    for shape in [(1, 3, 16, 20), (3, 3, 9, 24), (2, 3, 33, 12)]:
        x = torch.randn(shape)
        for run in (cut, loaded, fast):
            check(run(x), model(x))


@torch.no_grad()
def test_sizes_that_have_to_agree_are_compared() -> None:
    torch.manual_seed(0)
    model = Pooled().eval()
    left, right = torch.randn(2, 2, 3, 12, 18)
    cut = disco.partition(model, ({"left": left, "right": right},), 2, dynamic_size=True)
    left, right = torch.randn(2, 3, 3, 20, 10)
    expected = model({"left": left, "right": right})["logits"]
    check(cut({"left": left, "right": right})["logits"], expected)
    with pytest.raises(InputError, match=r"sizes with Eq\(.*of 'images_right'"):
        cut({"left": left, "right": right[..., :8]})


def test_a_size_that_the_graph_is_not_for_is_refused() -> None:
    cut = disco.partition(
        Pooled(), ({k: torch.randn(1, 3, 9, 9) for k in ("left", "right")},), 2, dynamic_size=True
    )
    with pytest.raises(InputError, match=r"captured for sizes with .* \(dimension \d of") as caught:
        cut({k: torch.randn(1, 3, 2, 9) for k in ("left", "right")})
    assert "\n" not in str(caught.value)


class Fixed(nn.Module):
    """Its forward insists on a size, as ViT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-1] == 8, f"Wrong image width! Expected 8 but got {x.shape[-1]}!")
        return self.conv(x)


def test_a_model_of_one_size_says_why_and_what_to_do() -> None:
    with pytest.raises(InputError, match="dynamic image size: .*; capture it without") as caught:
        disco.partition(Fixed(), (torch.randn(1, 3, 8, 8),), dynamic_size=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no example input is an image \[B, C, H, W\]"):
        disco.partition(nn.Linear(4, 4), (torch.randn(1, 4),), dynamic_size=True)
