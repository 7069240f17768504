"""The table that chooses between two kernels, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import disco_kernels as dk
from benchmarks import tune_sm90
from disco_kernels.cuda import choice, conv2d_sm90
from disco_kernels.cuda.choice import Key
from disco_kernels.cuda.conv2d_sm90 import Conv2dSm90
from disco_kernels.cuda.tuned import TUNED
from disco_kernels.spec import Channels, Conv2dDescriptor, Node, Segment
from disco_kernels.triton.tables import Lists

TILES = ["256x32", "256x64"]


class FakeKernel:
    """What the extension is asked when a layer is made."""

    reason = ""

    def __init__(self, nodes: object, window: object, is_bfloat16: bool) -> None:
        self.given = (nodes, window, is_bfloat16)

    @classmethod
    def why_not(cls, nodes: object, window: object) -> str:
        return cls.reason

    @staticmethod
    def why_not_width(width: int, one_row: bool, tile: int) -> str:
        return "too wide" if width > (64 if tile == 1 else 256) else ""

    @staticmethod
    def tiles() -> list[str]:
        return TILES


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeKernel]:
    monkeypatch.setattr(conv2d_sm90, "_kernel_class", lambda: FakeKernel)
    monkeypatch.setattr(FakeKernel, "reason", "")
    return FakeKernel


def two_nodes() -> Lists:
    own = (Segment(0, Channels(64)), Segment(0, Channels(64, 64)))
    read = Segment(0, Channels(16, 0, torch.tensor([*range(72, 80), *range(96, 104)]).int()))
    nodes = (Node((own[0], read), Channels(40)), Node((own[1],), Channels(24, 40)))
    return Lists.of(Conv2dDescriptor(dk.ConvSpec((3, 3)), nodes))


def test_a_layer_is_told_as_runs(fake: type[FakeKernel]) -> None:
    spec = dk.ConvSpec((3, 3), (2, 2), (1, 0), activation="relu")
    layer = Conv2dSm90.make(two_nodes(), spec, torch.float16)
    assert layer is not None and Key.of(two_nodes(), spec) == Key(9, 2, 2, 40, 80)
    nodes, window, is_bfloat16 = layer._kernel.given
    assert window == (3, 3, 2, 1, 0, 1, 1) and not is_bfloat16
    runs = [(0, 64, 0), (72, 8, 64), (96, 8, 72)]
    assert nodes == [(runs, 40, 0, 80, 0), ([(64, 64, 0)], 24, 40, 64, 9 * 80 * 40)]


def test_what_the_kernel_cannot_is_left_to_triton(fake: type[FakeKernel]) -> None:
    lists = two_nodes()
    assert Conv2dSm90.make(lists, dk.ConvSpec((3, 3)), torch.float32) is None
    assert Conv2dSm90.make(lists, dk.ConvSpec((3, 3), activation="silu"), torch.bfloat16) is None
    assert Conv2dSm90.make(lists, dk.ConvSpec((3, 3), (1, 2)), torch.bfloat16) is None
    fake.reason = "something else"
    assert Conv2dSm90.make(lists, dk.ConvSpec((3, 3)), torch.bfloat16) is None


def test_memory_that_the_kernel_cannot_read_is_left_to_triton(
    fake: type[FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "is_hopper", lambda device: True)
    layer = Conv2dSm90.make(two_nodes(), dk.ConvSpec((3, 3)), torch.bfloat16)
    assert layer is not None

    def maps(channels: int = 128, width: int = 6) -> torch.Tensor:
        return torch.zeros(2, 5, width, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    weight, bias = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(66, dtype=torch.bfloat16)
    assert layer.takes([maps()], weight, None, (maps(64), None))
    assert layer.takes([maps()], weight, bias[2:], (maps(64), maps(64)))
    assert not layer.takes([maps()], weight, bias[1:65], (maps(64), None))
    assert not layer.takes([maps()], weight[1:], None, (maps(64), None))
    assert not layer.takes([maps(132)[:, 4:]], weight, None, (maps(64), None))
    assert not layer.takes([maps(132)[:, :128]], weight, None, (maps(64), None))
    assert not layer.takes([maps().contiguous()], weight, None, (maps(64), None))
    assert not layer.takes([maps()], weight, None, (maps(64), maps(68)[:, :64]))
    assert not layer.takes([maps(width=300)], weight, None, (maps(64, 300), None))
    wider = ([maps(width=80)], weight, None, (maps(64, 80), None))
    assert layer.takes(*wider) and layer.takes(*wider, 0) and not layer.takes(*wider, 1)
    endless = torch.empty(2**20, 32, 32, 64, dtype=torch.bfloat16, device="meta")
    assert not layer.takes([maps()], weight, None, (endless.permute(0, 3, 1, 2), None))


def test_the_nearest_size_that_was_measured_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    *alike, inputs = key = Key.of(two_nodes(), dk.ConvSpec((3, 3)))
    monkeypatch.setitem(TUNED, tuple(key), {1000: None, 100000: "256x64"})
    monkeypatch.setitem(TUNED, (*alike, inputs + 8), {1: "256x32"})

    def chosen(*sizes: int) -> list[str | None]:
        return [choice.choose(choice.measured(key), n) for n in sizes]

    assert chosen(0, 1000, 24_000, 26_000, 399_999) == [None, None, None, "256x64", "256x64"]
    assert chosen(400_001, 10**9) == [None, None], "too far from all that was measured"
    monkeypatch.setitem(TUNED, tuple(key), {1000: "256x32"})
    assert chosen(249, 250, 4000, 4001) == [None, "256x32", "256x32", None]


def test_the_nearest_inputs_that_were_measured_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*keys: tuple[int, int, int, int, int]) -> int | None:
        monkeypatch.setattr(choice, "TUNED", {key: {1000: str(i)} for i, key in enumerate(keys)})
        found = choice.choose(choice.measured(Key(9, 1, 2, 40, 80)), 1000)
        return None if found is None else int(found)

    assert chosen() is None
    assert chosen((9, 1, 2, 40, 64)) == 0 and chosen((9, 1, 2, 40, 100)) == 0
    assert chosen((9, 1, 2, 40, 63)) is None and chosen((9, 1, 2, 40, 101)) is None
    assert chosen((9, 1, 2, 40, 64), (9, 1, 2, 40, 96)) == 1
    assert chosen((9, 1, 2, 40, 72), (9, 1, 2, 40, 96)) == 0
    for other in ((1, 1, 2, 40, 80), (9, 2, 2, 40, 80), (9, 1, 3, 40, 80), (9, 1, 2, 48, 80)):
        assert chosen(other) is None


def test_the_table_is_made_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"size": 56, "stride": 2}
    row = {"key": [9, 2, 2, 64, 64], "shape": shape, "batch": 2, "chosen_ms": 0.2}
    rows = [
        {**row, "times_ms": {"sm90 256x64": 0.1, "64x64x64": 0.01, "cublas": 0.11}},
        {**row, "batch": 1, "times_ms": {"sm90 256x64": 0.199}},
        {**row, "batch": 3, "times_ms": {"sm90 256x64": 0.1, "cublas": 0.09}},
        {**row, "batch": 4, "times_ms": {}},
    ]
    measured, target = tmp_path / "measured.json", tmp_path / "tuned.py"
    measured.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("sys.argv", ["tune_sm90", str(measured), str(target)])
    tune_sm90.main()
    found: dict[str, object] = {}
    exec(target.read_text(), found)
    wanted = {784: None, 1568: "256x64", 2352: choice.CUBLAS, 3136: None}
    assert found["TUNED"] == {(9, 2, 2, 64, 64): wanted}
    shipped = Path(conv2d_sm90.__file__).with_name("tuned.py").read_text()
    assert shipped.startswith(tune_sm90.HEAD.rstrip())
