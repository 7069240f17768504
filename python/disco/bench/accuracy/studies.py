"""What is compared: studies (a task, a model and its data) and methods, as plain settings.

A run of a method begins with the weights of the study's dense model (the thin one with those of a
thin model), so all methods have the same epochs and schedules: those of the dense model and then
their own. The dense baseline is trained on as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST, DENSE, THIN_FIRST, THIN = "first", "dense", "thin-first", "thin"


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: in results.
        text: in tables.
        settings: fields of `TrainConfig`, beside the study's.
        taught: imitate the study's dense model, trained to its end.
        wire_dtypes: the metric is measured with these on the wire, too, by the nodes themselves.
        loses_nodes: measure what remains without each node.
        on_ranks: with two nodes, measure the first seed's metric over processes as well.
    """

    name: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    taught: bool = False
    wire_dtypes: tuple[str, ...] = ()
    loses_nodes: bool = False
    on_ranks: bool = False


def _magnitude(density: float, **settings: Any) -> dict[str, Any]:
    return {"method": "magnitude", "density": density, **settings}


_PERIODIC = {"method": "magnitude", "density": 1.0, "allocation": "periodic"}
# Co-location is not part of it: it begins better and ends no better (docs/training.md).
_FULL: Mapping[str, Any] = {"allocation": "global"}

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(FIRST, "dense, before", {"method": "dense"}),
        Method(DENSE, "dense", {"method": "dense"}),
        Method("independent", "independent nodes", {"method": "independent"}),
        Method(THIN_FIRST, "thin dense, before", {"method": "dense"}),
        Method(THIN, "thin dense, DISCO's FLOPs", {"method": "dense"}),
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
            "global and distillation, d=0.2",
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
        Method(
            "whole", "without node dropout, d=0.2", _magnitude(0.2, clip_norm=1.0), loses_nodes=True
        ),
        Method(
            "node-dropout",
            "node dropout 0.5, d=0.2",
            _magnitude(0.2, clip_norm=1.0, node_dropout=0.5),
            loses_nodes=True,
        ),
    )
}

_ALL = tuple(name for name in METHODS if name not in (FIRST, THIN_FIRST, "whole", "node-dropout"))
_FEW = ("independent", "magnitude", "disco", "disco-int8")
_MAIN = ("dense", *_FEW)
_SOME = (*_MAIN, "thin", "every-2")
_ENDS = ("independent", "disco")
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
        width_step: widths of the thin model are multiples of it.
        points: of the metric that are called one; 0.01 for shares, 1 for decibels.
    """

    name: str
    text: str
    settings: Mapping[str, Any]
    first_epochs: int
    epochs: int
    methods: Mapping[int, tuple[str, ...]]
    width_step: int = 1
    points: float = 0.01


# Of all trainings: masks tighten over the first half, and the second half is trained with them.
_SCHEDULE = {"begin": 0.0, "end": 0.5, "warmup_epochs": 1, "evaluate_every": 1000}

_SCENES = {**_SCHEDULE, "data": "scenes:train=2000,val=5000", "batch_size": 32}
_ENLARGE = {
    **_SCHEDULE,
    "task": "super-resolution",
    "data": "photographs:train=1000",
    "optimizer": "adamw",
    "lr": 0.002,
    "weight_decay": 0.0,
    "batch_size": 16,
}

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "digits-resnet",
            "classification, convolutions: noisy digits, resnet8-w40, top-1 in %",
            {
                **_SCHEDULE,
                "task": "classification",
                "data": "digits",
                "model": "resnet8-w40",
                "val_share": 0.5,
                "noise": 0.8,
            },
            first_epochs=25,
            epochs=25,
            methods={4: _ALL, 2: (*_FEW, *_LOSS), 8: (*_FEW, "global", "colocate")},
        ),
        Study(
            "digits-deit",
            "classification, transformer: noisy digits, deit_micro-w80, top-1 in %",
            {
                **_SCHEDULE,
                "task": "classification",
                "data": "digits",
                "model": "deit_micro-w80",
                "val_share": 0.5,
                "noise": 0.4,
                "optimizer": "adamw",
                "lr": 0.002,
            },
            first_epochs=25,
            epochs=100,
            methods={2: (*_SOME, *_LOSS), 4: _ENDS},
            width_step=4,
        ),
        Study(
            "scenes-deeplab",
            "segmentation, convolutions: scenes of 32 px, deeplab_small-w40, mIoU in %",
            {
                **_SCENES,
                "task": "segmentation",
                "model": "deeplab_small-w40",
                "image_size": 32,
                "optimizer": "adamw",
                "lr": 0.004,
            },
            first_epochs=10,
            epochs=20,
            methods={2: _SOME, 4: _ENDS},
        ),
        Study(
            "scenes-segmenter",
            "segmentation, transformer: scenes of 32 px, segmenter_small, mIoU in %",
            {
                **_SCENES,
                "task": "segmentation",
                "model": "segmenter_small-w80",
                "image_size": 32,
                "optimizer": "adamw",
                "lr": 0.002,
            },
            first_epochs=10,
            epochs=20,
            methods={2: _SOME, 4: _ENDS},
            width_step=4,
        ),
        Study(
            "scenes-ssd",
            "detection, convolutions: scenes of 48 px, ssd_small-w40, mAP in %",
            {
                **_SCENES,
                "task": "detection",
                "model": "ssd_small-w40",
                "optimizer": "adamw",
                "lr": 0.003,
            },
            first_epochs=10,
            epochs=16,
            methods={2: (*_SOME, "distill"), 4: _ENDS},
        ),
        Study(
            "scenes-vit-ssd",
            "detection, transformer: scenes of 48 px, vit_ssd_small, mAP in %",
            {
                **_SCENES,
                "task": "detection",
                "model": "vit_ssd_small-w80",
                "optimizer": "adamw",
                "lr": 0.002,
            },
            first_epochs=10,
            epochs=16,
            methods={2: _SOME, 4: _ENDS},
            width_step=8,
        ),
        Study(
            "photographs-edsr",
            "super-resolution x2, convolutions: photographs, edsr_small_x2, PSNR in dB",
            {**_ENLARGE, "model": "edsr_small_x2-w40"},
            first_epochs=8,
            epochs=8,
            methods={4: _SOME, 2: _FEW, 8: ("independent", "magnitude", "disco")},
            points=1.0,
        ),
        Study(
            "photographs-transformer",
            "super-resolution x2, transformer: photographs, sr_transformer_small_x2, PSNR in dB",
            {**_ENLARGE, "model": "sr_transformer_small_x2-w80"},
            first_epochs=8,
            epochs=8,
            methods={4: _SOME, 2: ("disco",)},
            width_step=4,
            points=1.0,
        ),
    )
}
