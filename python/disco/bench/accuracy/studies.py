"""What is compared: studies (a task, a model and its data) and methods, as plain settings.

A run of a method begins with the weights of the study's dense model, so all methods have the same
epochs: those of the dense model and then their own. The dense baseline is trained on as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST, DENSE, THIN = "first", "dense", "thin"


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: in results.
        text: in tables.
        settings: fields of `TrainConfig`, beside the study's.
        taught: imitate the study's dense model.
        scratch: begin with random weights, and train as long as the dense model and a method.
        wire_dtypes: the metric is measured with these on the wire, too, by the nodes themselves.
        loses_nodes: measure what remains without each node.
        on_ranks: with two nodes, measure the metric over processes as well.
    """

    name: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    taught: bool = False
    scratch: bool = False
    wire_dtypes: tuple[str, ...] = ()
    loses_nodes: bool = False
    on_ranks: bool = False


def _magnitude(density: float, **settings: Any) -> dict[str, Any]:
    return {"method": "magnitude", "density": density, **settings}


_PERIODIC = {"method": "magnitude", "density": 1.0, "allocation": "periodic"}
_FULL: Mapping[str, Any] = {"allocation": "global", "colocate": True}

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(FIRST, "dense, before", {"method": "dense"}),
        Method(DENSE, "dense", {"method": "dense"}),
        Method("independent", "independent nodes", {"method": "independent"}),
        Method(THIN, "thin dense, DISCO's FLOPs", {"method": "dense"}, scratch=True),
        Method(
            "every-2", "all channels, every 2nd", {**_PERIODIC, "method_options": {"period": 2}}
        ),
        Method(
            "every-4", "all channels, every 4th", {**_PERIODIC, "method_options": {"period": 4}}
        ),
        Method(
            "magnitude", "magnitude, d=0.2", _magnitude(0.2), wire_dtypes=("int8",), on_ranks=True
        ),
        Method("d0.4", "magnitude, d=0.4", _magnitude(0.4)),
        Method("d0.1", "magnitude, d=0.1", _magnitude(0.1), wire_dtypes=("int8",)),
        Method("l1", "score l1, d=0.2", _magnitude(0.2, score="l1")),
        Method("taylor", "score Taylor, d=0.2", _magnitude(0.2, score="taylor")),
        Method("activation", "score activation, d=0.2", _magnitude(0.2, score="activation")),
        Method("group-lasso", "group lasso, d=0.2", {"method": "group_lasso", "density": 0.2}),
        Method("admm", "ADMM, d=0.2", {"method": "admm", "density": 0.2}),
        Method("global", "bytes shared out globally, d=0.2", _magnitude(0.2, allocation="global")),
        Method("colocate", "co-location, d=0.2", _magnitude(0.2, colocate=True)),
        Method("distill", "distillation, d=0.2", _magnitude(0.2), taught=True),
        Method(
            "disco",
            "co-location, global, distillation, d=0.2",
            _magnitude(0.2, **_FULL),
            taught=True,
            wire_dtypes=("int8",),
            on_ranks=True,
        ),
        Method(
            "disco-int8",
            "the same for int8, d=0.1",
            _magnitude(0.1, wire_dtype="int8", **_FULL),
            taught=True,
            wire_dtypes=("int8",),
            on_ranks=True,
        ),
        Method("whole", "without node dropout, d=0.2", _magnitude(0.2), loses_nodes=True),
        Method(
            "node-dropout",
            "node dropout 0.3, d=0.2",
            _magnitude(0.2, node_dropout=0.3),
            loses_nodes=True,
        ),
    )
}

_ALL = tuple(name for name in METHODS if name not in (FIRST, "whole", "node-dropout"))
_MAIN = ("dense", "independent", "magnitude", "disco", "disco-int8")
_FEW = ("independent", "magnitude", "disco", "disco-int8")
_LOSS = ("whole", "node-dropout")


@dataclass(frozen=True)
class Study:
    """A task, a model and its data.

    Attributes:
        name: in results.
        text: in tables.
        settings: fields of `TrainConfig`; the seed is set, and divides the data.
        first_epochs: of the dense model that all methods begin with.
        epochs: of each method after that.
        methods: by number of nodes, those that are compared.
        width: the thin model's name is the model's with this separator and its width.
        points: of the metric that are called one; 0.01 for shares, 1 for decibels.
        allowed: points below the dense model that DISCO may be.
    """

    name: str
    text: str
    settings: Mapping[str, Any]
    first_epochs: int
    epochs: int
    methods: Mapping[int, tuple[str, ...]]
    width_step: int = 1
    points: float = 0.01
    allowed: float = 0.5


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "digits-resnet",
            "classification, convolutions: noisy digits, resnet8-w40, top-1",
            {
                "task": "classification",
                "data": "digits",
                "model": "resnet8-w40",
                "val_share": 0.5,
                "noise": 0.8,
                "warmup_epochs": 2,
            },
            first_epochs=25,
            epochs=25,
            methods={2: (*_FEW, *_LOSS), 4: _ALL, 8: (*_FEW, "global", "colocate")},
        ),
    )
}
