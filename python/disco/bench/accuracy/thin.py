"""The thin models: as narrow as makes their FLOPs those of DISCO."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from disco import api
from disco.bench.accuracy.studies import Study
from disco.small_models import base_name
from disco.tasks import task_named
from disco.train import TrainConfig

_THIN: dict[tuple[str, int], str] = {}


def thin_model(study: Study, nodes: int) -> str:
    """The study's model, as wide as makes its FLOPs nearest to those of DISCO at d=0.2, all nodes
    together."""
    key = study.name, nodes
    if key not in _THIN:
        config = TrainConfig(**study.settings)
        example, model = _untrained(config, config.model_name)
        api.sparsify_(model, nodes, 0.2, (example,))
        target = sum(api.partition(model, (example,), nodes).plan.flops_per_rank)
        widths = range(study.width_step, _width(config.model_name) + 1, study.width_step)

        def distance(width: int) -> int:
            name = f"{base_name(config.model_name)}-w{width}"
            example, thin = _untrained(config, name)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                thin.eval()(example)
            return abs(counter.get_total_flops() - target)

        low, high = 0, len(widths) - 1
        while high - low > 2:  # the distance falls and rises once
            middle = (low + high) // 2
            if distance(widths[middle]) <= distance(widths[middle + 1]):
                high = middle + 1
            else:
                low = middle
        best = min(widths[low : high + 1], key=distance)
        _THIN[key] = f"{base_name(config.model_name)}-w{best}"
    return _THIN[key]


def _untrained(config: TrainConfig, name: str) -> tuple[torch.Tensor, torch.nn.Module]:
    task = task_named(config.task)
    data = task.load_data(config.data, config.data_options)
    size = data.preprocessing.size
    model = task.build_model("disco", name, len(data.classes), size, 0)
    return torch.zeros(1, 3, size, size), model


def _width(name: str) -> int:
    return int(name.rpartition("-w")[2])
