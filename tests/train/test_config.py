"""Settings: checked, in JSON and back, and the functions of them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from disco.errors import InputError
from disco.train import TrainConfig
from disco.train.config import parse_options
from disco.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "chess"}, "no task 'chess'"),
        ({"method": "prune"}, "method is one of dense, independent, .* given 'prune'"),
        ({"optimizer": "lion"}, "optimizer is one of sgd, adamw; given 'lion'"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more; given 0"),
        ({"epochs": 2.5}, "given 2.5"),
        ({"epochs": True}, "given True"),
        ({"epochs": None}, "given None"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"seed": -1}, "seed must be a whole number, 0 or more"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"lr": float("nan")}, "given nan"),
        ({"lr": "fast"}, "given 'fast'"),
        ({"weight_decay": -0.1}, "weight_decay must be a number, 0 or more"),
        ({"density": 1.5}, r"density must be a number in \[0, 1\]; given 1.5"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be a number in \[0, 1\)"),
        ({"warmup_epochs": 20.0}, "a warm-up of 20 epochs was given for a training of 20"),
        ({"method_options": {"rho": "high"}}, "the option rho must be a number; given 'high'"),
        ({"begin": 0.7}, "to begin at 0.7 of the steps and to end at 0.6"),
        ({"colocate": True}, "given init=None and the method magnitude: give the weights"),
        ({"colocate": True, "method": "dense", "init": "x"}, "init='x' and the method dense"),
        ({"method": "dense", "method_options": {"rho": 1}}, "dense takes no options, and rho"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**changed)


def test_json_and_back() -> None:
    config = TrainConfig(lr=0.1 + 0.2, method="admm", method_options={"rho": 1e-3})
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InputError, match="no setting momentum"):
        TrainConfig.from_json({"momentum": 0.9})


def test_models_and_densities() -> None:
    assert (TrainConfig().source, TrainConfig(model="resnet20").model_name) == (
        "disco",
        "resnet20",
    )
    config = TrainConfig(model="timm:deit_tiny_patch16_224")
    assert (config.source, config.model_name) == ("timm", "deit_tiny_patch16_224")
    config = TrainConfig(model="resnet50")
    assert (config.model, config.source) == ("torchvision:resnet50", "torchvision")
    densities = [TrainConfig(method=m).target_density for m in ("dense", "independent", "admm")]
    assert densities == [1.0, 0.0, 0.2]


@pytest.mark.parametrize("total", [1, 2, 7, 100, 12345])
def test_sparsification_has_its_share_of_the_steps(total: int) -> None:
    begin, end, every = TrainConfig(begin=0.25, end=0.75).steps_between(total)
    assert begin == round(total / 4) and end == max(begin + 1, round(total * 3 / 4))
    assert every >= 1 and (total < 200 or 45 <= (end - begin) / every <= 55)
    assert TrainConfig(every=3).steps_between(total)[2] == 3


def test_options_of_a_method() -> None:
    assert parse_options(["rho=1e-3", "decay=1"]) == {"rho": 1e-3, "decay": 1.0}
    for wrong in ("rho", "rho=", "rho=high", "=x"):
        with pytest.raises(InputError, match="is not of the form NAME=NUMBER"):
            parse_options([wrong])


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 10, 0.4) for step in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10] == 0.4 and rates[55] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[99] < 0.001
    assert learning_rate(0, 1, 0, 0.4) == 0.4
