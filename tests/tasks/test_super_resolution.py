"""L1 and the metrics against float64 written out, and the networks, cut exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disco
from disco.errors import InputError
from disco.small_models import SMALL_MODELS
from disco.small_models.super_resolution import EDSR
from disco.tasks import Classification, DistillOptions, LossOptions, SuperResolution, task_named
from disco.tasks.patches import Target
from disco.tasks.super_resolution import bicubic, luminance

TASK = SuperResolution()
NETWORKS = ("edsr_small", "srresnet_small", "sr_transformer_small")


def target(high: Tensor, photographs: list[int] | None = None, scale: int = 2) -> Target:
    numbers = [0] * len(high) if photographs is None else photographs
    return Target(high, torch.tensor(numbers), scale)


def test_losses_are_mean_absolute_differences() -> None:
    found, high, taught = torch.rand(3, 3, 5, 8, 8).unbind()
    exact = float((found.double() - high.double()).abs().mean())
    # A mean of 576 values below 1.
    tolerance = 576 * torch.finfo(torch.float32).eps
    assert abs(float(TASK.loss(found[:, :3], target(high[:, :3]), LossOptions())) - float(
        (found[:, :3].double() - high[:, :3].double()).abs().mean()
    )) <= tolerance  # fmt: skip
    exact = float((found.double() - taught.double()).abs().mean())
    for temperature in (1.0, 4.0):
        value = float(TASK.distillation(found, taught, DistillOptions(temperature)))
        assert abs(value - exact) <= tolerance
    assert float(TASK.distillation(found, found, DistillOptions())) == 0.0


def test_targets_of_a_batch() -> None:
    examples = [Target(torch.rand(3, 4, 4), torch.tensor(n), 2) for n in (4, 1)]
    batch = TASK.collate(examples)
    assert batch.high.shape == (2, 3, 4, 4) and batch.photograph.tolist() == [4, 1]
    assert batch.scale == 2


def test_luminance_is_that_of_matlab() -> None:
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = luminance(colours[:, :, None, None]).flatten() * 255
    assert found.tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966], abs=1e-4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_metrics_against_float64(scale: int) -> None:
    """Over batches that divide the photographs, with borders that are left out."""
    torch.manual_seed(0)
    high = (torch.rand(9, 3, 24, 24) * 255).round() / 255
    found = high + 0.1 * torch.randn(high.shape)  # beyond [0, 1], too
    numbers = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    meter = TASK.new_meter(("red", "green", "blue"))
    for batch in (slice(0, 4), slice(4, 9)):
        meter.update(found[batch], target(high[batch], numbers[batch], scale))

    def plain(images: Tensor) -> Tensor:
        rounded = (images.double().clamp(0, 1) * 255).round() / 255
        red, green, blue = rounded.unbind(1)
        y = (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255
        return y[:, scale:-scale, scale:-scale]

    y, wanted = plain(found), plain(high)
    psnr, ssim = [], []
    for number in range(3):
        own = torch.tensor(numbers) == number
        psnr.append(-10 * math.log10(float(((y[own] - wanted[own]) ** 2).mean())))
        ssim.append(float(_ssim(y[own], wanted[own]).mean()))
    # Float32's sums of squared errors: relative errors of some 1e-6, of which 4.3 times are dB.
    assert meter.value() == pytest.approx(sum(psnr) / 3, abs=1e-4)
    assert meter.others() == {"ssim": pytest.approx(sum(ssim) / 3, abs=1e-4)}
    assert meter.value() == pytest.approx(sum(psnr) / 3, abs=1e-4)


def _ssim(found: Tensor, wanted: Tensor) -> Tensor:
    """Wang et al. (2004), equations 13 to 16, with a mirrored border: float64 [B, h, w]."""
    steps = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(steps**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x[:, None], (5, 5, 5, 5), "reflect"), window[None, None])[:, 0]

    a, b = mean(found), mean(wanted)
    variances = mean(found**2) - a**2 + mean(wanted**2) - b**2
    covariance = mean(found * wanted) - a * b
    c1, c2 = 0.01**2, 0.03**2
    return (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variances + c2))


def test_the_metric_at_its_edges() -> None:
    high = (torch.rand(2, 3, 16, 16) * 255).round() / 255
    meter = TASK.new_meter(())
    meter.update(high + 0.001, target(high))  # rounding takes that away
    assert meter.value() == 100.0 and meter.others()["ssim"] == pytest.approx(1, abs=1e-6)

    border, inside = high.clone(), high.clone()
    border[:, :, :2], border[..., -2:] = 0.5, 0.0
    inside[:, :, 2, 2] = 1 - inside[:, :, 2, 2].round()
    for images, right in ((border, True), (inside, False)):
        meter = TASK.new_meter(())
        meter.update(images, target(high))
        assert (meter.value() == 100.0) is right

    meter = TASK.new_meter(())
    meter.update(torch.full_like(high, float("nan")), target(high))
    assert 0 < meter.value() < 10


@pytest.mark.parametrize(
    "outputs", [(torch.ones(2, 3, 8, 8),), torch.ones(2, 3), torch.ones(2, 3, 12, 12)]
)
def test_outputs_that_are_no_such_images_are_refused(outputs: object) -> None:
    wanted = target(torch.ones(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"images of shape \(2, 3, 8, 8\) are wanted"):
        TASK.loss(outputs, wanted, LossOptions())
    with pytest.raises(InputError, match="enlarges by the scale of the data"):
        TASK.new_meter(()).update(outputs, wanted)


def test_there_are_no_labels_to_smooth() -> None:
    high = torch.ones(2, 3, 8, 8)
    with pytest.raises(InputError, match="has no labels"):
        TASK.loss(high, target(high), LossOptions(0.1))


def test_the_task_by_name() -> None:
    assert isinstance(task_named("super-resolution"), SuperResolution)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scale", "nodes"),
    [
        ("edsr_small", 2, 4),
        ("edsr_small", 3, 8),
        ("edsr_small", 4, 2),
        ("srresnet_small", 2, 4),
        ("srresnet_small", 3, 2),
        ("sr_transformer_small", 2, 4),
        ("sr_transformer_small", 4, 2),
    ],
)
def test_networks_are_cut_exactly(name: str, scale: int, nodes: int) -> None:
    model = TASK.build_model("disco", f"{name}_x{scale}", 3, 8, seed=1)
    _rouse(model)
    x = torch.rand(3, 3, 8, 8)
    disco.sparsify_(model, nodes, 0.25, (x,))
    exact = model.double()(x.double())
    partitioned = disco.partition(model.float(), (x,), nodes)
    assert exact.shape == (3, 3, 8 * scale, 8 * scale)
    assert float((partitioned(x) - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


def _rouse(model: nn.Module) -> None:
    """What the last layer adds counts, though a new model's begins small."""
    last = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    last.weight *= 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["edsr", "srresnet"])
def test_the_papers_sizes_enlarge_too(name: str) -> None:
    """Thinner; what is wide in them is not another shape."""
    for scale in (2, 3, 4):
        model = TASK.build_model("disco", f"{name}_x{scale}-w6", 3, 8, seed=0)
        assert model(torch.rand(1, 3, 9, 12)).shape == (1, 3, 9 * scale, 12 * scale)
    x = torch.rand(2, 3, 6, 6)
    exact = model.double()(x.double())
    found = disco.partition(model.float(), (x,), 2)(x)
    assert float((found - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


@torch.no_grad()
def test_scaled_residuals_are_cut_exactly() -> None:
    model = EDSR(2, 8, 2, residual_scale=0.1).eval()
    x = torch.rand(2, 3, 6, 6)
    plain = EDSR(2, 8, 2).eval()
    plain.load_state_dict(model.state_dict())
    for block in plain.blocks:
        block.conv2.weight *= 0.1
        block.conv2.bias *= 0.1
    exact = model.double()(x.double())
    for network in (model, plain):
        found = disco.partition(network.float(), (x,), 2)(x)
        assert float((found - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


@torch.no_grad()
def test_new_networks_begin_near_to_the_enlargement() -> None:
    x = torch.rand(4, 3, 16, 16)
    names = [name for name in SMALL_MODELS if name.partition("_x")[0] in NETWORKS]
    assert len(names) == 9
    for name in names:
        scale = int(name[-1])
        found = TASK.build_model("disco", name, 3, 16, seed=0)(x)
        assert found.shape == (4, 3, 16 * scale, 16 * scale)
        assert float((found - bicubic(scale)(x)).abs().mean()) < 0.15


def test_classifiers_do_not_enlarge_and_the_other_way_round() -> None:
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match="enlarges by the scale"):
        TASK.loss(
            TASK.build_model("disco", "resnet8", 3, 8, seed=0)(x),
            target(torch.rand(2, 3, 16, 16)),
            LossOptions(),
        )
    with pytest.raises(InputError, match="in place of logits"):
        outputs = TASK.build_model("disco", "edsr_small_x2", 3, 8, seed=0)(x)
        Classification().loss(outputs, torch.tensor([0, 1]), LossOptions())
