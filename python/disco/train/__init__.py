"""Training: the loop, its run folder, evaluation of what it made."""

from disco.train.config import METHODS, TrainConfig
from disco.train.evaluation import Evaluation, evaluate, evaluate_run
from disco.train.run_folder import Run, is_run, open_run
from disco.train.start import resume, train
from disco.train.wire import simulated

__all__ = [
    "METHODS",
    "Evaluation",
    "Run",
    "TrainConfig",
    "evaluate",
    "evaluate_run",
    "is_run",
    "open_run",
    "resume",
    "simulated",
    "train",
]
