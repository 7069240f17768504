"""Segmentation: loss, distillation and mIoU against plain float64, small models, scenes as data."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import disco
from disco.errors import InputError
from disco.tasks import DataOptions, DistillOptions, LossOptions, Segmentation, task_named
from disco.tasks.masks import IGNORED

TASK = Segmentation()


def _masks(classes: int, *shape: int, ignored: float = 0.2) -> Tensor:
    masks = torch.randint(0, classes, shape)
    masks[torch.rand(shape) < ignored] = IGNORED
    return masks


def _cross_entropy(logits: Tensor, masks: Tensor, smoothing: float) -> Tensor:
    """In float64, pixel by pixel."""
    classes = logits.shape[1]
    logs = logits.double().log_softmax(1)
    wanted = torch.full_like(logs, smoothing / classes)
    known = masks.clamp(max=classes - 1)[:, None]
    wanted.scatter_(1, known, 1 - smoothing + smoothing / classes)
    return -(wanted * logs).sum(1)[masks != IGNORED].mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_known_pixels(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 5, 7, 9), _masks(5, 3, 7, 9)
    found = TASK.loss(logits, masks, LossOptions(smoothing))
    expected = _cross_entropy(logits, masks, smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    both = TASK.loss({"out": logits, "aux": 2 * logits}, masks, LossOptions(smoothing))
    expected = expected + 0.4 * _cross_entropy(2 * logits, masks, smoothing)
    assert float(both) == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_scales_logits_to_the_mask() -> None:
    # Bilinear in between, at pixel centres: two pixels to four are 0, 1/4, 3/4, 1.
    logits = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    wide = torch.tensor([0.0, 0.25, 0.75, 1.0])
    expected = torch.stack((wide, 1 - wide))[None, :, None]
    masks = torch.tensor([[[0, 1, 1, IGNORED]]])
    assert float(TASK.loss(logits, masks, LossOptions())) == pytest.approx(
        float(_cross_entropy(expected, masks, 0.0)), rel=1e-6
    )


def test_a_batch_of_ignored_pixels_teaches_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = TASK.loss(logits, torch.full((2, 4, 4), IGNORED), LossOptions(0.1))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    meter = TASK.new_meter("abc")
    meter.update(logits.detach(), torch.full((2, 4, 4), IGNORED))
    with pytest.raises(InputError, match="every pixel of the masks is 255"):
        meter.value()


def test_distillation_is_a_divergence_a_pixel() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    options = DistillOptions(3.0)
    a, b = (x.double().div(3).log_softmax(1) for x in (logits, teacher))
    expected = 9 * (b.exp() * (b - a)).sum(1).mean()
    found = TASK.distillation({"out": logits}, teacher, options)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(TASK.distillation(logits, logits, options)) == 0
    coarse = torch.zeros(2, 4, 2, 2)
    assert float(TASK.distillation(coarse, torch.zeros(2, 4, 6, 6), options)) == 0


def test_the_metric_is_the_mean_of_the_classes_that_occur() -> None:
    torch.manual_seed(0)
    # Classes 5 and 6 are in no mask; 5 is found, 6 is not.
    meter = TASK.new_meter([str(k) for k in range(7)])
    counts = torch.zeros(7, 7, dtype=torch.float64)
    for batch in (3, 2):
        logits, masks = torch.randn(batch, 7, 8, 6), _masks(5, batch, 8, 6)
        logits[:, 6] = -9
        meter.update({"out": logits}, masks)
        for right, found in zip(masks.flatten(), logits.argmax(1).flatten(), strict=True):
            if right != IGNORED:
                counts[right, found] += 1
    both = counts.diag()
    either = counts.sum(0) + counts.sum(1) - both
    assert either[5] > 0
    assert either[6] == 0
    assert meter.value() == pytest.approx(float((both / either)[:6].mean()), rel=1e-6)


def test_perfect_outputs_and_lost_ones() -> None:
    masks = _masks(3, 2, 6, 6)
    perfect = torch.nn.functional.one_hot(masks.clamp(max=2), 3).permute(0, 3, 1, 2).float()
    meter = TASK.new_meter("abc")
    meter.update(perfect, masks)
    assert meter.value() == 1
    meter = TASK.new_meter("abc")
    meter.update(torch.full_like(perfect, torch.nan), masks)
    assert meter.value() == 0


@pytest.mark.parametrize("outputs", [torch.ones(2, 3), {"logits": torch.ones(2, 3, 4, 4)}, ()])
def test_outputs_that_are_no_maps_are_refused(outputs: Any) -> None:
    with pytest.raises(InputError, match=r"in place of logits \[images, classes, height, width\]"):
        TASK.loss(outputs, torch.zeros(2, 4, 4, dtype=torch.int64), LossOptions())


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "disco.tasks.metric_library.importlib.util.find_spec",
        lambda name: None if name == "torchmetrics" else found(name),
    )
    with pytest.raises(InputError, match="`pip install torchmetrics`"):
        TASK.new_meter("ab")


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("name", ["deeplab_small-w8", "segmenter_small-w32"])
def test_small_segmenters_are_cut_exactly(name: str, nodes: int) -> None:
    size = 32
    model = TASK.build_model("disco", name, 7, size, seed=1)
    x = torch.randn(3, 3, size, size)
    disco.sparsify_(model, nodes, 0.25, (x,))
    exact = model.double()(x.double())
    partitioned = disco.partition(model.float(), (x,), nodes)
    assert exact.shape[:2] == (3, 7)
    assert float((partitioned(x) - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


@pytest.mark.parametrize("size", [(48, 48), (37, 51), (8, 8)])
def test_the_small_deeplab_takes_odd_sizes(size: tuple[int, int]) -> None:
    model = TASK.build_model("disco", "deeplab_small-w4", 3, 48, seed=0)
    half = tuple((side + 1) // 2 for side in size)
    assert model(torch.zeros(2, 3, *size)).shape == (2, 3, *half)


def test_scenes_are_augmented_with_their_masks() -> None:
    data = task_named("segmentation").load_data("scenes:train=40,val=3", DataOptions(image_size=24))
    assert (len(data.train), len(data.val), len(data.classes)) == (40, 3, 7)
    image, mask = data.train.load(5, None)
    assert image.shape == (3, 24, 24)
    assert mask.dtype == torch.uint8
    moved = 0
    for seed in range(0, 1 << 30, 98_765_431):
        again, moved_mask = data.train.load(5, seed)
        moved += not torch.equal(again, image)
        # Where a colour comes from one place, so does its label.
        labels = {
            (tuple(c), int(k))
            for c, k in zip(image.flatten(1).T.tolist(), mask.flatten(), strict=True)
        }
        assert all(
            (tuple(c), int(k)) in labels
            for c, k in zip(again.flatten(1).T.tolist(), moved_mask.flatten(), strict=True)
        )
    assert moved > 5
    unchanged = task_named("segmentation").load_data(
        "scenes:train=40,val=3", DataOptions(image_size=24, augment=False)
    )
    assert torch.equal(unchanged.train.load(5, 77)[0], image)
