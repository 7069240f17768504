"""What a training run is asked to do: plain values, checked, in JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from disco.errors import InputError
from disco.sparsify import WIRE_DTYPES
from disco.tasks import DataOptions, DistillOptions, LossOptions, task_named
from disco.zoo import full_name

METHODS = ("dense", "independent", "magnitude", "group_lasso", "admm")
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        task, data: see `disco.tasks`.
        model: a small one's name, "torchvision:NAME" or "timm:NAME"; other names get the first of
            these that has them (see `disco.zoo.full_name`).
        image_size: side of the inputs in pixels; None for the data's usual one.
        val_share, split_seed, augment, train_count, noise: see `DataOptions`.
        epochs, batch_size: the last batch of an epoch is left out if it is smaller.
        evaluate_every: epochs from one measurement of the metric to the next; the last is measured.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        lr: the largest learning rate; None is 0.05 for SGD and 0.001 for AdamW.
        weight_decay: not for vectors (norms, biases); None is 5e-4 for SGD and 0.05 for AdamW.
        warmup_epochs: over which the learning rate rises linearly; it falls as a cosine then.
        clip_norm: gradients are scaled down to this norm; None for no limit.
        label_smoothing: see `LossOptions`.
        seed: of random weights, the order of examples, augmentation and dropout.
        init: weights to begin with, a file or a finished run's folder; None for random ones.
        method: "dense" (no sparsity), "independent" (no exchange at all: magnitude at density 0),
            "magnitude", "group_lasso" or "admm".
        nodes, density, score, allocation, group_size: of `disco.sparsify.Sparsifier`.
        colocate: first permute the channels of `init` between nodes (`disco.colocate_`).
        begin, end: when sparsification begins and ends, as shares of all steps.
        every: steps between two updates of the masks; None for about 50 updates in all.
        method_options: what else the method takes, by name.
        wire_dtype: that payloads will travel in, "float32", "float16", "bfloat16" or "int8": from
            `end` of the steps on, when masks are final, training sees what arrives of them.
        node_dropout: with this probability a step, from `end` of the steps on, one node is lost in
            it, in [0, 1).
        teacher: a finished run's folder, whose model is imitated; None for none.
        distill_weight: of the teacher's part of the loss, in [0, 1]; the labels' has the rest.
        distill_temperature: see `DistillOptions`.
        amp: compute in bfloat16 where torch's autocast holds that for safe; on CUDA only.
    """

    task: str = "classification"
    data: str = "digits"
    model: str = "resnet8"
    image_size: int | None = None
    val_share: float = 0.2
    split_seed: int = 0
    augment: bool = True
    train_count: int | None = None
    noise: float = 0.0
    epochs: int = 20
    evaluate_every: int = 1
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    warmup_epochs: float = 1.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    seed: int = 0
    init: str | None = None
    method: str = "magnitude"
    nodes: int = 2
    density: float = 0.2
    score: str = "l2"
    allocation: str = "uniform"
    group_size: int = 1
    colocate: bool = False
    begin: float = 0.1
    end: float = 0.6
    every: int | None = None
    method_options: Mapping[str, float] = field(default_factory=dict)
    wire_dtype: str = "float32"
    node_dropout: float = 0.0
    teacher: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 2.0
    amp: bool = False

    def __post_init__(self) -> None:
        task_named(self.task)
        # What is kept names the source: a name may mean another model where more is installed.
        object.__setattr__(self, "model", full_name(self.model))
        _check_choice("method", self.method, METHODS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in (
            "epochs",
            "evaluate_every",
            "batch_size",
            "nodes",
            "every",
            "image_size",
            "train_count",
        ):
            _check(self, name, "a whole number, 1 or more", lambda v: _whole(v) and v >= 1)
        for name in ("seed", "split_seed"):
            _check(self, name, "a whole number, 0 or more", lambda v: _whole(v) and 0 <= v < 2**63)
        for name in ("lr", "clip_norm", "distill_temperature"):
            _check(self, name, "a number above 0", lambda v: _number(v) and v > 0)
        for name in ("weight_decay", "warmup_epochs", "noise"):
            _check(self, name, "a number, 0 or more", lambda v: _number(v) and v >= 0)
        for name in ("density", "begin", "end", "distill_weight"):
            _check(self, name, "a number in [0, 1]", lambda v: _number(v) and 0 <= v <= 1)
        for name in ("label_smoothing", "node_dropout"):
            _check(self, name, "a number in [0, 1)", lambda v: _number(v) and 0 <= v < 1)
        _check_choice("wire_dtype", self.wire_dtype, WIRE_DTYPES)
        if self.node_dropout and self.nodes < 2:
            raise InputError(
                f"node_dropout {self.node_dropout:g} was given for one node, which cannot be lost: "
                "leave it out, or give more nodes"
            )
        if self.end == 1 and (self.node_dropout or self.wire_dtype != "float32"):
            raise InputError(
                "training for payloads in a wire dtype and for lost nodes begins when masks are "
                "final, and end 1 leaves no steps for it: let sparsification end earlier"
            )
        for name, value in self.method_options.items():
            if not _number(value):
                raise InputError(f"the option {name} must be a number; given {value!r}")
        if self.warmup_epochs >= self.epochs and self.epochs > 1:
            raise InputError(
                f"a warm-up of {self.warmup_epochs:g} epochs was given for a training of "
                f"{self.epochs}: give fewer"
            )
        if self.begin > self.end:
            raise InputError(
                f"sparsification was to begin at {self.begin:g} of the steps and to end at "
                f"{self.end:g}: let it end later"
            )
        if self.colocate and (self.init is None or self.method == "dense"):
            raise InputError(
                "colocate puts coupled channels of trained weights on one node, for a method that "
                f"prunes them; given init={self.init!r} and the method {self.method}: give the "
                "weights of a dense training with init and another method, or leave colocate out"
            )
        if self.method == "dense" and self.method_options:
            raise InputError(
                f"the method dense takes no options, and {', '.join(self.method_options)} was given"
            )

    @property
    def source(self) -> str:
        """Of the model, as the zoo calls it."""
        return self.model.partition(":")[0] if ":" in self.model else "disco"

    @property
    def model_name(self) -> str:
        """Of the model, in its source."""
        return self.model.partition(":")[2] if ":" in self.model else self.model

    @property
    def target_density(self) -> float:
        """Of the exchange at the end."""
        return {"dense": 1.0, "independent": 0.0}.get(self.method, self.density)

    @property
    def peak_lr(self) -> float:
        """The largest learning rate."""
        return self.lr if self.lr is not None else {"sgd": 0.05, "adamw": 1e-3}[self.optimizer]

    @property
    def decay(self) -> float:
        """The weight decay."""
        usual = {"sgd": 5e-4, "adamw": 0.05}
        return self.weight_decay if self.weight_decay is not None else usual[self.optimizer]

    @property
    def data_options(self) -> DataOptions:
        return DataOptions(
            image_size=self.image_size,
            val_share=self.val_share,
            split_seed=self.split_seed,
            augment=self.augment,
            train_count=self.train_count,
            noise=self.noise,
        )

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(self.label_smoothing)

    @property
    def distill_options(self) -> DistillOptions:
        return DistillOptions(self.distill_temperature)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of all attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_json`. Raises InputError for unknown names and wrong values."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise InputError(f"a training run has no setting {', '.join(unknown)}: remove it")
        return cls(**data)

    def steps_between(self, total: int) -> tuple[int, int, int]:
        """`begin_step`, `end_step` and `every` of the sparsifier, for `total` steps."""
        begin = round(self.begin * total)
        end = max(begin + 1, round(self.end * total))
        return begin, end, self.every or max(1, (end - begin) // _UPDATES)


# Of the masks: Zhu & Gupta (arXiv 1710.01878) saw no difference between 100 and 1000 steps each.
_UPDATES = 50


def parse_options(pairs: list[str]) -> dict[str, float]:
    """``name=number`` as a dict. Raises InputError."""
    options: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            options[name] = float(text)
        except ValueError:
            raise InputError(
                f"the option {pair!r} is not of the form NAME=NUMBER, for example strength=1e-4"
            ) from None
    return options


def _check(config: TrainConfig, name: str, allowed: str, holds: Callable[[Any], bool]) -> None:
    value = getattr(config, name)
    optional = next(f for f in fields(config) if f.name == name).default is None
    if not (value is None and optional) and not holds(value):
        raise InputError(f"{name} must be {allowed}; given {value!r}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is one of {', '.join(allowed)}; given {value!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
