"""Weights of many kernels packed together, and the choice of algorithms within a budget."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import disco_kernels as dk
from disco_kernels.winograd import fit_packed_bytes

SPEC = dk.ConvSpec((3, 3), padding=(1, 1), winograd="auto")

# Alternatives of a layer as those of Winograd: fewer bytes, and less saved, from one to the next.
# What is given up first saves least a byte.
_STEPS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=3)


def _layer(steps: list[tuple[int, int]]) -> list[tuple[int, float]]:
    steps = sorted(steps, key=lambda step: step[1] / step[0])
    num_bytes, saved = sum(s[0] for s in steps), sum(s[1] for s in steps)
    layer = []
    for fewer, less in steps:
        layer.append((num_bytes, float(saved)))
        num_bytes, saved = num_bytes - fewer, saved - less
    return layer


@given(st.lists(_STEPS, min_size=0, max_size=5), st.integers(0, 300))
def test_the_budget_holds_and_is_used(steps: list[list[tuple[int, int]]], limit: int) -> None:
    layers = [_layer(s) for s in steps]
    assert fit_packed_bytes(layers, None) == [0] * len(layers)
    if sum(layer[-1][0] for layer in layers) > limit:
        with pytest.raises(ValueError, match=f"need at least .* {limit} are allowed"):
            fit_packed_bytes(layers, limit)
        return
    chosen = fit_packed_bytes(layers, limit)
    assert chosen == fit_packed_bytes([list(layer) for layer in layers], limit)
    total = sum(layer[place][0] for layer, place in zip(layers, chosen, strict=True))
    assert total <= limit
    for layer, place in zip(layers, chosen, strict=True):
        for better in range(place):
            # A layer's better alternative was not left out while there was room for it.
            assert total + layer[better][0] - layer[place][0] > limit


@given(st.lists(_STEPS, min_size=1, max_size=4), st.data())
def test_close_to_the_best_choice(steps: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    """Never below the best by more than the step that did not fit."""
    layers = [_layer(s) for s in steps]
    least = sum(layer[-1][0] for layer in layers)
    limit = data.draw(st.integers(least, sum(layer[0][0] for layer in layers)))

    def saved(places: tuple[int, ...] | list[int]) -> float:
        return sum(layer[p][1] for layer, p in zip(layers, places, strict=True))

    def fits(places: tuple[int, ...]) -> bool:
        return sum(layer[p][0] for layer, p in zip(layers, places, strict=True)) <= limit

    best = max(
        saved(places)
        for places in itertools.product(*(range(len(layer)) for layer in layers))
        if fits(places)
    )
    largest = max(layer[0][1] - layer[-1][1] for layer in layers)
    assert best - largest <= saved(fit_packed_bytes(layers, limit)) <= best


def _convolutions(packing: dk.Packing | None) -> list[dk.PartialConv2d]:
    generator = torch.Generator().manual_seed(0)
    return [
        dk.PartialConv2d(
            torch.randn(n, n, 3, 3, generator=generator),
            [n],
            SPEC,
            image_size=(edge, edge),
            backend="cpu",
            packing=packing,
        )
        for n, edge in ((16, 56), (32, 28), (64, 14), (64, 7))
    ]


def test_what_saves_least_a_byte_is_given_up_first_cpu() -> None:
    free = dk.Packing()
    wanted = _convolutions(free)
    free.finish()
    total = free.packed_bytes
    assert [kernel.algorithm for kernel in wanted] == ["f4", "f4", "f2", "off"]
    assert total == sum(kernel.packed_bytes for kernel in wanted)
    found = []
    for limit in range(total, total // 4, -997):
        packing = dk.Packing(limit)
        kernels = _convolutions(packing)
        try:
            packing.finish()
        except ValueError:
            break
        assert packing.packed_bytes <= limit
        found.append([kernel.algorithm for kernel in kernels])
    # Small maps first; the largest keeps its F(4x4) longest, and all end up direct.
    assert ["f4", "f2", "f2", "off"] in found and ["f4", "f2", "off", "off"] in found
    assert found[-1][1:] == ["off"] * 3 and ["f2", "f4", "f2", "off"] not in found


def test_packed_together_and_alone_cpu() -> None:
    packing = dk.Packing()
    together = _convolutions(packing)
    packing.finish()
    del packing
    gc.collect()
    x = {n: torch.randn(1, n, 9, 9) for n in (16, 32, 64)}
    for kernel, alone in zip(together, _convolutions(None), strict=True):
        copied = pickle.loads(pickle.dumps(copy.deepcopy(kernel)))
        image = x[kernel.out_channels]
        for found in (kernel, copied):
            assert torch.equal(found.packed_weight, alone.packed_weight)
            assert torch.equal(found([image]), alone([image]))
        # Not the whole block of memory that it lies in.
        assert len(pickle.dumps(kernel)) < kernel.packed_bytes + 16384


def test_grouped_and_linear_kernels_cpu() -> None:
    packing = dk.Packing()
    grouped, size = torch.randn(48, 24, 3, 3), (28, 28)
    kernel = dk.GroupedConv2d(grouped, 2, SPEC, image_size=size, backend="cpu", packing=packing)
    narrow = torch.randn(16, 1, 3, 3)
    depthwise = dk.GroupedConv2d(narrow, 16, SPEC, image_size=size, backend="cpu", packing=packing)
    linear = dk.PartialLinear(torch.randn(6, 5), [5], backend="cpu", packing=packing)
    packing.finish()
    assert (kernel.algorithm, depthwise.algorithm, linear.algorithm) == ("f4", "off", "off")
    x = torch.randn(1, 48, 6, 6)
    alone = dk.GroupedConv2d(grouped, 2, SPEC, image_size=size, backend="cpu")
    assert torch.equal(kernel(x), alone(x))


def test_before_it_is_finished_cpu() -> None:
    packing = dk.Packing()
    kernel = dk.PartialLinear(torch.randn(6, 5), [5], packing=packing)
    for use in (lambda: kernel([torch.randn(3, 5)]), lambda: copy.deepcopy(kernel)):
        with pytest.raises(RuntimeError, match="call Packing.finish first"):
            use()
    with pytest.raises(ValueError, match="allow more"):
        tight = dk.Packing(10)
        dk.PartialLinear(torch.randn(6, 5), [5], packing=tight)
        tight.finish()
    packing.finish()
    assert packing.packed_bytes == kernel.packed_bytes
    packing.finish()
    assert packing.packed_bytes == kernel.packed_bytes


def test_the_limit_is_for_all_together_cpu() -> None:
    weight = torch.randn(16, 16)
    packing = dk.Packing(2000)
    first = dk.PartialLinear(weight, [16], backend="cpu", packing=packing)
    packing.finish()
    assert 1000 < packing.packed_bytes == first.packed_bytes < 2000
    second = dk.PartialLinear(weight, [16], backend="cpu", packing=packing)
    with pytest.raises(ValueError, match=f"{2000 - first.packed_bytes} are allowed"):
        packing.finish()
    packing.limit = 4000
    packing.finish()
    assert torch.equal(second([weight]), first([weight]))


@pytest.mark.parametrize("limit", [True, 2.5e5, float("nan"), "5"])
def test_a_limit_that_is_no_number_of_bytes(limit: object) -> None:
    with pytest.raises(ValueError, match="limit must be a whole number of bytes"):
        dk.Packing(limit)  # type: ignore[arg-type]


def test_a_size_that_is_not_needed_is_not_looked_at_cpu() -> None:
    """Inputs may have another size than the one told, also where that could not be."""
    for kernel in (
        dk.PartialConv2d(torch.ones(4, 4, 3, 3), [4], dk.ConvSpec((3, 3)), image_size=(2, 2)),
        dk.GroupedConv2d(torch.ones(4, 1, 3, 3), 4, dk.ConvSpec((3, 3)), image_size=(2, 2)),
    ):
        x = torch.ones(1, 4, 5, 5)
        assert kernel([x] if isinstance(kernel, dk.PartialConv2d) else x).shape == (1, 4, 3, 3)


def test_an_empty_layer() -> None:
    packing = dk.Packing()
    kernel = dk.PartialLinear(torch.randn(0, 4), [4], backend="reference", packing=packing)
    packing.finish()
    assert kernel([torch.randn(3, 4)]).shape == (3, 0)
