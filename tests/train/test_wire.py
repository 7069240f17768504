"""Training for rounded payloads and lost nodes: its beginning, resuming, and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import disco
from disco.train import TrainConfig, open_run, resume, simulated, train
from disco.train.loop import Training
from disco.train.wire import WireTraining
from tests.train.conftest import Settings

WIRE = {"method": "magnitude", "wire_dtype": "int8", "node_dropout": 0.5, "end": 0.4}


def silent(line: str) -> None:
    pass


class Stop(Exception):
    pass


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    before = Training._step

    def stopping(self: Training, *args: Any) -> float:
        if self.epoch * len(self.batches) + args[-1] == step:
            raise Stop
        return before(self, *args)

    monkeypatch.setattr(Training, "_step", stopping)


def test_resuming_gives_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in the second epoch, all of which is simulated, after lost nodes were drawn."""
    config = settings(**WIRE)
    whole = train(config, tmp_path / "whole", silent)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        _stop_at(patched, 20)
        train(config, tmp_path / "cut", silent)
    assert resume(tmp_path / "cut", {}, silent) == whole
    both = [open_run(tmp_path / name) for name in ("whole", "cut")]
    assert both[0].weights.read_bytes() == both[1].weights.read_bytes()
    assert both[0].pattern.read_bytes() == both[1].pattern.read_bytes()


def test_it_begins_when_masks_are_final(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[int, tuple[bool, tuple[int, ...]]] = {}
    before = Training._step

    def watched(self: Training, *args: Any) -> float:
        assert self.simulation is not None and self.sparsifier is not None
        steps = self.sparsifier.steps
        simulation = self.simulation._simulation

        def note(module: torch.nn.Module, _: Any) -> None:
            # The last of a step: the first simulated one also tries and captures the model.
            done[steps] = simulation.attached, simulation.lost

        hook = self.model.register_forward_pre_hook(note)
        found = before(self, *args)
        hook.remove()
        return found

    monkeypatch.setattr(Training, "_step", watched)
    config = settings(**WIRE)
    train(config, tmp_path / "x", silent)
    total = len(done)
    _, end, _ = config.steps_between(total)
    assert all(on == (steps >= end) for steps, (on, _) in done.items())
    lost = [ranks for on, ranks in done.values() if on]
    # Half of 18 steps or so, of either node; and none before.
    assert {(), (0,), (1,)} == set(lost) and 0 < lost.count(()) < len(lost)
    assert not any(ranks for on, ranks in done.values() if not on)


def test_simulated_runs_are_their_ranks(settings: Settings, tmp_path: Path) -> None:
    train(settings(**{**WIRE, "epochs": 1}), tmp_path / "x", silent)
    run = open_run(tmp_path / "x")
    model, x = run.load_model(), torch.randn(5, 3, 8, 8)
    part = disco.partition(model, (x[:2],), 2, wire_dtype=torch.int8, survivable=True)
    predict = simulated(run, "int8", (), torch.device("cpu"))
    with torch.no_grad():
        found, expected, whole = predict(x), part(x), model(x)
    # A value may be one step of int8 away where float32 is at a tie; not all are.
    assert (found - expected).abs().max() < 0.3 * (found - whole).abs().max()
    assert not torch.equal(simulated(run, "float32", (1,), torch.device("cpu"))(x), whole)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"node_dropout": 1.0}, r"node_dropout must be a number in \[0, 1\)"),
        ({"node_dropout": 0.1, "nodes": 1}, "one node, which cannot be lost"),
        ({"wire_dtype": "int4"}, "wire_dtype is one of float32, float16, bfloat16, int8"),
        ({"wire_dtype": "int8", "end": 1.0}, "leaves no steps"),
    ],
)
def test_wrong_settings(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(disco.InputError, match=text):
        TrainConfig(**changed)


def test_what_cannot_be_simulated_is_said_before_a_folder_is_made(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise disco.InputError("draws random numbers")

    monkeypatch.setattr("disco.sparsify.wire.check_trains_alike", refuse)
    with pytest.raises(disco.InputError, match="draws random numbers"):
        train(settings(**WIRE), tmp_path / "x", silent)
    assert not (tmp_path / "x").exists()


def test_the_same_nodes_are_lost_from_the_same_state(settings: Settings) -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        wire = WireTraining(settings(**WIRE), 10, torch.zeros(2, 3, 8, 8))
        wire.attach = lambda model: None  # type: ignore[method-assign, assignment]
        found = []
        for step in range(10):
            with wire.step(torch.nn.Identity(), step):
                found.append(wire._simulation.lost)
        draws.append(found)
    assert draws[0] == draws[1] and draws[0][:4] == [()] * 4 and any(draws[0])
