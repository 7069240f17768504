"""Losses against float64 written out, the metric at its edges, and the small models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import disco
from disco.errors import InputError
from disco.small_models import SMALL_MODELS
from disco.tasks import Classification, DistillOptions, LossOptions, task_named

TASK = Classification()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_of_smoothed_labels(smoothing: float) -> None:
    logits, targets = torch.randn(7, 5) * 3, torch.randint(0, 5, (7,))
    wanted = torch.full((7, 5), smoothing / 5, dtype=torch.float64)
    wanted[range(7), targets] += 1 - smoothing
    exact = -(wanted * logits.double().log_softmax(1)).sum(1).mean()
    # Logits up to about 10, whose rounding of half an epsilon each the sum of 5 hands on.
    tolerance = 64 * torch.finfo(torch.float32).eps * float(exact)
    assert abs(float(TASK.loss(logits, targets, LossOptions(smoothing)) - exact)) <= tolerance


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation(temperature: float) -> None:
    logits, teacher = torch.randn(6, 4), torch.randn(6, 4)
    p = (teacher.double() / temperature).softmax(1)
    q = (logits.double() / temperature).softmax(1)
    exact = float((p * (p / q).log()).sum(1).mean()) * temperature**2
    options = DistillOptions(temperature)
    found = float(TASK.distillation(logits, teacher, options))
    # The terms of a divergence cancel, so its error is that of terms of up to 1 times T^2.
    assert abs(found - exact) <= 32 * torch.finfo(torch.float32).eps * temperature**2
    assert float(TASK.distillation(teacher, teacher, options)) == 0.0


def test_losses_in_bfloat16_are_computed_in_float32() -> None:
    logits, targets = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    assert torch.equal(
        TASK.loss(logits, targets, LossOptions()), TASK.loss(logits.float(), targets, LossOptions())
    )


def test_the_metric_counts_and_never_takes_nan_for_an_answer() -> None:
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [float("nan")] * 2, [float("nan"), 0.0]])
    meter = TASK.new_meter(("a", "b"))
    meter.update(logits, torch.tensor([1, 1, 0, 0]))
    assert meter.value() == 1 / 4
    meter.update(logits, torch.tensor([1, 0, 1, 1]))
    assert meter.value() == 4 / 8


@pytest.mark.parametrize("outputs", [(torch.ones(2, 3),), torch.ones(3), {"out": torch.ones(2, 3)}])
def test_outputs_that_are_no_logits_are_refused(outputs: object) -> None:
    with pytest.raises(InputError, match=r"in place of logits \[images, classes\]"):
        TASK.loss(outputs, torch.tensor([0, 1]), LossOptions())


def test_tasks_by_name() -> None:
    assert isinstance(task_named("classification"), Classification)
    with pytest.raises(InputError, match="no task 'chess': classification, .* can be trained"):
        task_named("chess")


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet8_thin", "resnet14", "deit_micro"])
@pytest.mark.parametrize("size", [8, 16])
def test_small_models_are_cut_exactly(name: str, size: int) -> None:
    model = TASK.build_model("disco", name, 7, size, seed=1)
    x = torch.randn(3, 3, size, size)
    disco.sparsify_(model, 2, 0.25, (x,))
    exact = model.double()(x.double())
    partitioned = disco.partition(model.float(), (x,), 2)
    assert exact.shape == (3, 7)
    assert float((partitioned(x) - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


def test_small_models_by_name() -> None:
    x = torch.zeros(2, 3, 32, 32)
    classifiers = [name for name in SMALL_MODELS if name.startswith(("resnet", "deit"))]
    assert len(classifiers) == 6
    for name in classifiers:
        assert TASK.build_model("disco", name, 4, 32, seed=0)(x).shape == (2, 4)
    with pytest.raises(InputError, match=r"no model 'resnet9': did you mean resnet8"):
        TASK.build_model("disco", "resnet9", 4, 32, seed=0)
    for name, channels in (("resnet8-w12", 48), ("deit_micro-w16", 16)):
        model = TASK.build_model("disco", name, 4, 32, seed=0)
        assert model(x).shape == (2, 4)
        assert (
            next(
                m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 4
            ).in_features
            == channels
        )
    for name in ("deit_micro-w18", "resnet8-w0"):
        with pytest.raises(InputError, match="it has to be a multiple of"):
            TASK.build_model("disco", name, 4, 32, seed=0)
    with pytest.raises(InputError, match="a multiple of 8 pixels; given 12"):
        TASK.build_model("disco", "deit_micro", 4, 12, seed=0)


@pytest.mark.parametrize(("source", "name"), [("torchvision", "resnet18"), ("timm", "resnet10t")])
def test_models_of_other_sources_get_the_classes_of_the_data(source: str, name: str) -> None:
    model = TASK.build_model(source, name, 3, 32, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
