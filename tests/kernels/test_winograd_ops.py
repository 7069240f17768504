"""Winograd by the operators that torch's dispatcher knows; the algorithm: `test_winograd.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from tests.kernels import oracle
from tests.kernels.cases import i32, image, needs_extension


@needs_extension
@pytest.mark.parametrize("tile", ["f2", "f4"])
def test_winograd_computes_the_convolution(tile: str) -> None:
    """Whole, in two passes and by nodes; the transforms round a few times more than the sums."""
    x, bias = image("w", 2, 20, 9, 10), torch.randn(18)
    weight, residual = torch.randn(18, 20, 3, 3), image("w", 2, 18, 9, 10)
    spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
    expected = oracle.conv2d(x, weight, spec, bias, residual)
    # Of a tile of 36 values every output sums up to 5 x 5, with factors up to 8.
    allowed = oracle.Expected(expected.value, expected.bound * (2 if tile == "f2" else 8))
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "backend": "cpu", "winograd": tile}

    def pack(part: Tensor) -> Tensor:
        return dk.prepack(part, [part.shape[1]], backend="cpu", winograd=tile)

    end: dict[str, Any] = {"residual": residual, "activation": "relu"}
    whole = dk.partial_conv2d(
        [x], [None], pack(weight), out_channels=18, bias=bias, **end, **options
    )
    oracle.check(whole, allowed, "whole")

    local, remote = weight[:, :12].contiguous(), weight[:, 12:].contiguous()
    passes = dk.partial_conv2d(
        [x], [i32(*range(12))], pack(local), out_channels=18, bias=bias, **options
    )
    dk.partial_conv2d_(passes, [x], [i32(*range(12, 20))], pack(remote), **end, **options)
    oracle.check(passes, allowed, "two passes")

    nodes = torch.cat([pack(weight[:7].contiguous()), pack(weight[7:].contiguous())])
    channels = i32(*range(20), *range(20))
    gathered = dk.gather_conv2d(x, channels, [20, 20], [7, 11], nodes, bias=bias, **end, **options)
    oracle.check(gathered, allowed, "nodes")

    direct = dk.partial_conv2d(
        [x],
        [None],
        dk.prepack(weight, [20], backend="cpu"),
        out_channels=18,
        bias=bias,
        **end,
        **{**options, "winograd": "off"},
    )
    assert not torch.equal(direct, whole), "the algorithm that was asked for did not run"


@needs_extension
def test_winograd_that_does_not_fit_is_refused() -> None:
    x, weight = image("w", 1, 5, 6, 6), torch.randn(6, 5, 3, 3)
    packed = {
        tile: dk.prepack(weight, [5], backend="cpu", winograd=tile) for tile in ("off", "f2", "f4")
    }
    plain = dk.prepack(weight, [5], backend="reference")

    def conv(weights: Tensor, backend: str = "cpu", **changed: Any) -> Tensor:
        options = {"kernel_size": 3, **changed}
        return dk.partial_conv2d([x], [None], weights, out_channels=6, backend=backend, **options)

    def add(tile: str, given: str) -> None:
        dk.partial_conv2d_(
            image("w", 1, 6, 4, 4),
            [x],
            [None],
            packed[given],
            kernel_size=3,
            backend="cpu",
            winograd=tile,
        )

    def gather(tile: str, given: str) -> Tensor:
        channels = i32(*range(5))
        return dk.gather_conv2d(
            x, channels, [5], [6], packed[given], kernel_size=3, backend="cpu", winograd=tile
        )

    covered = 0
    for tile in packed:
        for given in packed:
            if tile == given:
                continue
            for attempt in (
                lambda tile=tile, given=given: conv(packed[given], winograd=tile),
                lambda tile=tile, given=given: add(tile, given),
                lambda tile=tile, given=given: gather(tile, given),
            ):
                with pytest.raises(ValueError, match=f"not those of this .*, winograd {tile}: "):
                    attempt()
                covered += 1
    assert covered == 18

    unknown = "winograd must be one of off, f2, f4, given 'f6'"
    fits = r"winograd 'f[24]' is for kernels of 3 x 3"
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: conv(packed["f2"], winograd="auto"), "resolve it with disco_kernels.choose_win"),
        (lambda: add("auto", "f2"), "resolve it with disco_kernels.choose_winograd"),
        (lambda: gather("auto", "f2"), "resolve it with disco_kernels.choose_winograd"),
        (
            lambda: dk.prepack(weight, [5], backend="cpu", winograd="auto"),
            "resolve it with disco_kernels.choose_winograd",
        ),
        (lambda: dk.prepack(weight, [5], backend="cpu", winograd="f6"), unknown),
        (lambda: conv(packed["f2"], winograd="f6"), unknown),
        (lambda: conv(packed["f2"], winograd="f2", stride=2), fits),
        (lambda: conv(packed["f4"], winograd="f4", dilation=2), fits),
        (lambda: conv(packed["f4"], winograd="f4", kernel_size=1), fits),
        (lambda: dk.prepack(weight[:, :, :2], [5], backend="cpu", winograd="f4"), fits),
        (lambda: dk.prepack(torch.randn(6, 5), [5], backend="cpu", winograd="f2"), fits),
        (
            lambda: dk.prepack(weight, [5], backend="reference", winograd="f2"),
            "backend 'reference' has no Winograd, asked for 'f2'",
        ),
        (
            lambda: conv(plain, "reference", winograd="f4"),
            "backend 'reference' has no Winograd, asked for 'f4'",
        ),
    ]
    for attempt, message in attempts:
        with pytest.raises(ValueError, match=message):
            attempt()
    assert len(attempts) == 13


@needs_extension
def test_winograd_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    weight = torch.randn(6, 3, 3, 3)

    def packs_and_runs(x: Tensor, weight: Tensor) -> Tensor:
        packed = dk.prepack(weight, [3], backend="cpu", winograd="f4")
        return dk.partial_conv2d(
            [x],
            [None],
            packed,
            out_channels=6,
            kernel_size=3,
            padding=1,
            backend="cpu",
            winograd="f4",
        )

    compiled = torch.compile(packs_and_runs, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, 5), (3, 7)):
        x = image("w", batch, 3, size, size)
        assert torch.equal(compiled(x, weight), packs_and_runs(x, weight))
