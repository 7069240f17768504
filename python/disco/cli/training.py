"""The commands that train and evaluate: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from disco.cli.options import add_json
from disco.sparsify import GROUP_SIZES, WIRE_DTYPES
from disco.tasks import TASKS
from disco.train import METHODS
from disco.train.config import OPTIMIZERS, TrainConfig
from disco.train.evaluation import SPLITS
from disco.training_commands import evaluate_command, train_command

_DEFAULT = TrainConfig()
_MODELS = (
    "small ones (resnet8, deit_micro, ...; deeplab_small, segmenter_small; ssd_small, "
    "vit_ssd_small; edsr_small_x2, ...), torchvision's or timm's (resnet50, torchvision:resnet50, "
    "timm:resnet50)"
)
_DATA = (
    "to classify: digits, digits:FILE or folder:PATH; to segment: scenes, "
    "scenes:train=2000,val=5000, voc:PATH or masks:PATH; to detect: scenes, coco:PATH or "
    "voc:PATH; to enlarge: photographs, photographs:scale=3 or photos:PATH"
)


def add_train(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train a model that exchanges few channels",
        description="Train a model of which several nodes exchange few channels, in a new folder: "
        "config.json, checkpoints/, metrics.csv, and model.safetensors at the end.",
        epilog="examples:\n"
        "  disco train classification --model resnet8 --data digits --nodes 2 --density 0.2 "
        "--out runs/x\n"
        "  disco train classification --out runs/x --resume\n"
        "  disco evaluate runs/x\n"
        "  disco partition runs/x --out out/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("task", choices=list(TASKS), help="what to learn")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the run")
    train.add_argument("--resume", action="store_true", help="go on after the last checkpoint")
    train.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    train.add_argument("--workers", type=int, default=0, help="that read images (default: 0)")
    train.add_argument("--threads", type=int, help="to compute with (default: torch's choice)")
    add_json(train)
    _add_learning(train.add_argument_group("learning"))
    _add_sparsity(train.add_argument_group("sparsity"))
    train.set_defaults(handler=train_command)


def _add_learning(group: Any) -> None:
    _add(group, "model", str, _MODELS)
    _add(group, "data", str, _DATA)
    _add(group, "image-size", int, "in pixels", "the data's")
    _add(group, "val-share", float, "of each class, where data are not divided yet")
    _add(group, "split-seed", int, "of that division")
    _add(group, "train-count", int, "training images to learn from", "all")
    _add(group, "noise", float, "deviation of noise on the inputs")
    group.add_argument(
        "--no-augment",
        dest="augment",
        action="store_false",
        default=argparse.SUPPRESS,
        help="show training images unchanged",
    )
    _add(group, "epochs", int, "over the training images")
    _add(group, "evaluate-every", int, "epochs from one measurement to the next")
    _add(group, "batch-size", int, "images a step")
    _add(group, "optimizer", str, " or ".join(OPTIMIZERS))
    _add(group, "lr", float, "largest learning rate", "0.05 for sgd, 0.001 for adamw")
    _add(group, "weight-decay", float, "of matrices", "5e-4 for sgd, 0.05 for adamw")
    _add(group, "warmup-epochs", float, "in which the learning rate rises")
    _add(group, "clip-norm", float, "of the gradients", "no limit")
    _add(group, "label-smoothing", float, "share of a label spread over all")
    _add(group, "seed", int, "of weights, order and augmentation")
    _add(group, "init", str, "weights to begin with: a file, or a run's folder", "random")
    _add(group, "teacher", str, "a run's folder, to be imitated", "none")
    _add(group, "distill-weight", float, "of imitation in the loss")
    _add(group, "distill-temperature", float, "of imitation")
    group.add_argument(
        "--amp",
        action="store_true",
        default=argparse.SUPPRESS,
        help="bfloat16 where autocast allows it (cuda)",
    )


def _add_sparsity(group: Any) -> None:
    _add(group, "method", str, ", ".join(METHODS))
    _add(group, "nodes", int, "that will run the model")
    _add(group, "density", float, "of the exchange at the end")
    _add(group, "score", str, "of a channel: l1, l2, taylor, activation")
    _add(group, "allocation", str, "of the budget over layers: uniform, global, periodic")
    _add(group, "group-size", int, f"channels chosen together: {', '.join(map(str, GROUP_SIZES))}")
    group.add_argument(
        "--colocate",
        action="store_true",
        default=argparse.SUPPRESS,
        help="first permute the channels of --init between nodes, so that pruning loses less",
    )
    _add(group, "begin", float, "of sparsification, as a share of all steps")
    _add(group, "end", float, "of sparsification, as a share of all steps")
    _add(group, "wire-dtype", str, f"of payloads, simulated: {', '.join(WIRE_DTYPES)}")
    _add(group, "node-dropout", float, "probability that a step loses a node")
    _add(group, "every", int, "steps the masks change", "50 times in all")
    group.add_argument(
        "--method-option",
        dest="method_options",
        action="append",
        metavar="NAME=NUMBER",
        default=argparse.SUPPRESS,
        help="an option of the method; may be repeated",
    )


def _add(group: Any, name: str, kind: type, text: str, default: str | None = None) -> None:
    """Without a default of its own, so that what was given is known when a run goes on."""
    usual = getattr(_DEFAULT, name.replace("-", "_")) if default is None else default
    group.add_argument(
        f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {usual})"
    )


def add_evaluate(subparsers: Any) -> None:
    evaluate = subparsers.add_parser(
        "evaluate",
        help="measure a trained model, whole or on its nodes",
        description="Print the metric of a finished run on its validation images, or on others. "
        "--partition measures the nodes, one process each, in place of the model; --wire-dtype and "
        "--lose simulate them.",
        epilog="example:\n  disco evaluate runs/x --json result.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("run", type=Path, help="folder made by `disco train`")
    evaluate.add_argument("--data", help="as for `disco train` (default: the run's)")
    evaluate.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    evaluate.add_argument(
        "--partition", type=Path, metavar="DIR", help="made from the run by `disco partition`"
    )
    evaluate.add_argument(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        help="simulate payloads of the run's nodes in it",
    )
    evaluate.add_argument(
        "--lose",
        metavar="RANK[,RANK]",
        help="simulate the run's nodes without these",
    )
    evaluate.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    evaluate.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    evaluate.add_argument("--workers", type=int, default=0, help="that read images (default: 0)")
    evaluate.add_argument("--threads", type=int, help="to compute with")
    add_json(evaluate)
    evaluate.set_defaults(handler=evaluate_command)
