"""Ownership, the selected channels read off a weight, recorded patterns and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import disco_kernels as dk
from disco_kernels import LayerPattern, Ownership, Pattern, find_selected


def test_contiguous_shares_are_those_of_tensor_split() -> None:
    covered = 0
    for channels in range(0, 40):
        for ranks in range(1, 12):
            owned = Ownership.contiguous(channels, ranks)
            split = torch.arange(channels).tensor_split(ranks)
            assert owned.channels == tuple(tuple(part.tolist()) for part in split)
            assert owned.world_size == ranks and owned.num_channels == channels
            assert owned.counts == tuple(len(part) for part in split)
            assert owned.is_contiguous
            covered += 1
    assert covered == 440


def test_ownership_of_any_order() -> None:
    owned = Ownership(((4, 0), (), (1, 3, 2)))
    assert (owned.world_size, owned.num_channels, owned.counts) == (3, 5, (2, 0, 3))
    assert not owned.is_contiguous
    assert Ownership(((), (0,), ())).is_contiguous
    assert Ownership(((), ())).num_channels == 0


def test_ownership_is_plain_data_whatever_it_was_made_of() -> None:
    owned = Ownership(((0, 2), (1,)))
    made: tuple[Any, ...] = (
        [[0, 2], [1]],
        (np.array([0, 2]), np.array([1])),
        [torch.tensor([0, 2]), torch.tensor([1])],
        (range(0, 4, 2), [np.int64(1)]),
    )
    for channels in made:
        same = Ownership(channels)
        assert same == owned and hash(same) == hash(owned)
        assert all(type(c) is int for row in same.channels for c in row)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((), "at least one rank"),
        (((0, 1), (1,)), "exactly once"),
        (((0, 2),), "exactly once"),
        (((1, 2),), "exactly once"),
        (((-1, 0),), "exactly once"),
        (((0.0, 1.0),), "whole numbers"),
        ((("a",),), "whole numbers"),
        ((3,), "whole numbers"),
    ],
)
def test_bad_ownership(channels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ownership(channels)


def test_bad_contiguous_shares() -> None:
    with pytest.raises(ValueError, match="world_size must be at least 1, given 0"):
        Ownership.contiguous(4, 0)
    with pytest.raises(ValueError, match="num_channels must not be negative, given -1"):
        Ownership.contiguous(-1, 2)


def test_find_selected_reads_the_columns() -> None:
    weight = torch.zeros(4, 6, 3, 3)
    weight[0, 3, 1, 1] = 1.0  # rank 0 needs 3 of rank 1
    weight[1, 5, 2, 2] = -1e-30
    weight[2, 0] = float("nan")  # NaN is not zero
    weight[3, 4] = 7.0  # local to rank 1
    owned_out, owned_in = Ownership.contiguous(4, 2), Ownership.contiguous(6, 2)
    assert find_selected(weight, owned_out, owned_in) == (((), (3, 5)), ((0,), ()))
    assert find_selected(weight, owned_out, owned_in, 1e-20) == (((), (3,)), ((0,), ()))
    assert find_selected(weight, owned_out, owned_in, float("inf")) == (((), ()), ((0,), ()))
    # In the sender's order, for the receiver's rows.
    mixed_in = Ownership(((2, 1, 0), (5, 4, 3)))
    assert find_selected(weight, Ownership(((3, 1), (0, 2))), mixed_in) == (
        ((), (5, 4)),
        ((0,), ()),
    )


def test_find_selected_of_odd_shapes() -> None:
    two = Ownership.contiguous(2, 2)
    empty = Ownership(((), ()))
    assert find_selected(torch.zeros(2, 0, 3, 3), two, empty) == (((), ()), ((), ()))
    assert find_selected(torch.zeros(0, 2), empty, two) == (((), ()), ((), ()))
    assert find_selected(torch.ones(2, 2), two, two) == (((), (1,)), ((0,), ()))
    one = Ownership.contiguous(2, 1)
    assert find_selected(torch.ones(2, 2, 5), one, one) == (((),),)
    nobody = Ownership(((0, 1), ()))  # rank 1 computes nothing, so it needs nothing
    assert find_selected(torch.ones(2, 2), nobody, two) == (((), (1,)), ((), ()))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert find_selected(torch.ones(2, 2, dtype=dtype), two, two)[0][1] == (1,)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_find_selected_equals_its_definition(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    outputs, inputs = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 7))

    def owned(channels: int) -> Ownership:
        order = data.draw(st.permutations(range(channels)))
        rank_of = [data.draw(st.integers(0, ranks - 1)) for _ in order]
        return Ownership(
            tuple(tuple(c for c in order if rank_of[c] == rank) for rank in range(ranks))
        )

    owned_out, owned_in = owned(outputs), owned(inputs)
    bits = data.draw(st.lists(st.booleans(), min_size=outputs * inputs, max_size=outputs * inputs))
    weight = torch.tensor(bits, dtype=torch.float32).reshape(outputs, inputs)
    selected = find_selected(weight, owned_out, owned_in)
    for i, j in ((i, j) for i in range(ranks) for j in range(ranks)):
        needed = tuple(
            k
            for k in owned_in.channels[j]
            if i != j and any(weight[o, k] != 0 for o in owned_out.channels[i])
        )
        assert selected[i][j] == needed
    pattern = LayerPattern(owned_out, owned_in, selected)
    assert 0.0 <= pattern.density <= 1.0
    assert pattern.off_pattern_max(weight) == (0.0, -1, -1)
    assert dk.contradiction("layer", pattern, weight) is None


def test_find_selected_refuses_what_does_not_fit() -> None:
    two = Ownership.contiguous(2, 2)
    with pytest.raises(ValueError, match="has 3 output and 2 input channels"):
        find_selected(torch.zeros(3, 2), two, two)
    with pytest.raises(ValueError, match="same number of ranks"):
        find_selected(torch.zeros(2, 2), two, Ownership.contiguous(2, 1))
    with pytest.raises(ValueError, match=r"tolerance must not be negative, given -0\.5"):
        find_selected(torch.zeros(2, 2), two, two, -0.5)


def test_density_and_input_channels() -> None:
    owned = Ownership(((3, 0), (1, 2)))
    pattern = LayerPattern(owned, owned, (((), (2,)), ((3, 0), ())))
    assert pattern.density == 3 / 4
    assert pattern.input_channels(0) == (3, 0, 2)
    assert pattern.input_channels(1) == (0, 1, 2, 3)  # one run
    assert (
        LayerPattern(Ownership.contiguous(2, 1), Ownership.contiguous(2, 1), (((),),)).density == 0
    )


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ((((), ()),), "2 x 2 table"),
        ((((),), ((),)), "2 x 2 table"),
        ((((0,), ()), ((), ())), "sends itself nothing"),
        ((((), (0,)), ((), ())), "rank 1 does not own"),
        ((((), (1, 1)), ((), ())), "twice"),
        ((((), (9,)), ((), ())), "does not own"),
        ((((), (1.5,)), ((), ())), "whole numbers"),
    ],
)
def test_bad_selection(selected: Any, message: str) -> None:
    owned = Ownership.contiguous(2, 2)
    with pytest.raises(ValueError, match=message):
        LayerPattern(owned, owned, selected)


def test_contradictions_name_the_worst_block() -> None:
    owned = Ownership.contiguous(4, 2)
    pattern = LayerPattern(owned, owned, (((), (2,)), ((), ())))
    weight = torch.eye(4)
    weight[0, 2] = 5.0  # in the pattern
    state = {"a.weight": weight}
    recorded = Pattern({"a": pattern})
    assert recorded.contradictions(state) == []
    weight[3, 1], weight[0, 3] = -0.25, 0.125
    ((name, message),) = recorded.contradictions(state)
    assert name == "a" and "block (1, 0) holds |0.25|" in message
    assert recorded.contradictions(state, tolerance=0.25) == []
    weight[0, 3] = float("nan")
    ((_, message),) = recorded.contradictions(state, tolerance=1e9)
    assert "block (0, 1) holds |nan|" in message
    assert "has no weight here" in recorded.contradictions({})[0][1]
    assert (
        "has 5 output and 4 input" in recorded.contradictions({"a.weight": torch.zeros(5, 4)})[0][1]
    )


def test_contradictions_of_an_empty_weight() -> None:
    owned, nothing = Ownership.contiguous(2, 2), Ownership(((), ()))
    pattern = LayerPattern(nothing, owned, (((), ()), ((), ())))
    assert dk.contradiction("a", pattern, torch.zeros(0, 2, 3, 3)) is None


def recorded_pattern() -> Pattern:
    owned_out, owned_in = Ownership(((1, 0), (2,), ())), Ownership.contiguous(4, 3)
    selected = (((), (2,), ()), ((1, 0), (), (3,)), ((), (), ()))
    return Pattern({"block.0.conv": LayerPattern(owned_out, owned_in, selected), "": _square()})


def _square() -> LayerPattern:
    owned = Ownership.contiguous(2, 2)
    return LayerPattern(owned, owned, (((), (1,)), ((), ())))


def test_files_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    recorded_pattern().save(path)
    assert Pattern.load(path) == recorded_pattern()
    assert Pattern.load(str(path)).layers.keys() == recorded_pattern().layers.keys()
    before = path.read_bytes()
    Pattern.load(path).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pattern.json"]
    Pattern().save(path)
    assert Pattern.load(path) == Pattern()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    recorded_pattern().save(path)
    before = path.read_bytes()
    broken = Pattern({"a": object()})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        broken.save(path)
    assert path.read_bytes() == before


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    recorded_pattern().save(path)
    whole = path.read_bytes()
    content = json.loads(whole)

    def changed(**changes: Any) -> bytes:
        layer = {**content["layers"]["block.0.conv"], **changes}
        return json.dumps({**content, "layers": {"x": layer}}).encode()

    damaged: list[tuple[bytes, str]] = [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (whole[: len(whole) // 2], "not JSON"),
        (b"[]", 'no "format"'),
        (b"null", 'no "format"'),
        (b'{"format": "something"}', 'no "format"'),
        (json.dumps({**content, "version": 2}).encode(), "version 2; this release reads version 1"),
        (b'{"format": "disco-pattern", "version": 1}', "damaged"),
        (json.dumps({**content, "layers": [1]}).encode(), "damaged"),
        (json.dumps({**content, "layers": {"x": 3}}).encode(), "damaged"),
        (json.dumps({**content, "layers": {"x": {}}}).encode(), "damaged"),
        (changed(out_ownership=[[0, 0], [1], [2]]), "damaged"),
        (changed(out_ownership=[[0.0, 1], [2], []]), "damaged"),
        (changed(out_ownership=[[True, 0], [2], []]), "damaged"),
        (changed(out_ownership="abc"), "damaged"),
        (changed(out_ownership=[]), "damaged"),
        (changed(in_ownership=[[0, 1, 2, 3]]), "damaged"),
        (changed(selected=[]), "damaged"),
        (changed(selected=[[[], [0], []], [[], [], []], [[], [], []]]), "damaged"),
        (changed(selected=None), "damaged"),
    ]
    for number, (data, message) in enumerate(damaged):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as raised:
            Pattern.load(path)
        assert str(path) in str(raised.value), number
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400, number
    # Every cut of the file, too: never another error, never half a pattern.
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not JSON"):
            Pattern.load(path)
    with pytest.raises(FileNotFoundError):
        Pattern.load(tmp_path / "nowhere.json")
