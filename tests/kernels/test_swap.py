"""Swapping layers in place: what stays, what is reported, and that the way back is exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from disco_kernels.modules import SwappedConv2d, SwappedMixin
from tests.kernels.cases import needs_extension
from tests.kernels.models import (
    DEPTHWISE,
    SWAPPABLE,
    close,
    conv,
    images,
    inference,
    linear,
    small,
    sparsify,
    swappable,
)

both_backends = pytest.mark.parametrize(
    "backend",
    [pytest.param("cpu", marks=needs_extension), "reference"],
)
STAYS_ON_THE_REFERENCE = "grouped: the reference backend would do what torch does"


@both_backends
def test_swap_and_back_is_bit_identical(backend: str) -> None:
    model, x = small(), images()
    before = inference(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(m) for name, m in model.named_modules()}
    types = {name: type(m) for name, m in model.named_modules()}
    inside = {name: set(vars(m)) for name, m in model.named_modules()}
    buffers = [name for name, _ in model.named_buffers()]

    report = dk.swap_(model, nodes=2, backend=backend)
    names = swappable(backend)
    assert tuple(row.name for row in report.swapped) == names
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SwappedMixin)
        assert isinstance(layer, types[name]) and dk.backend_of(layer) == backend
    if DEPTHWISE not in names:
        assert dk.backend_of(model.get_submodule(DEPTHWISE)) == "torch"
    after = inference(model, x)
    assert close(after, before) and not torch.equal(after, before + 1)

    assert dk.unswap_(model) == len(names)
    assert torch.equal(inference(model, x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {name: set(vars(m)) for name, m in model.named_modules()} == inside
    assert [name for name, _ in model.named_buffers()] == buffers
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert dk.unswap_(model) == 0


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 20])
def test_any_number_of_nodes(nodes: int) -> None:
    """More nodes than channels, too: some then own nothing."""
    model, x = small(nodes), images(3)
    before = inference(model, x)
    report = dk.swap_(model, nodes)
    assert len(report.swapped) == (0 if nodes == 1 else len(SWAPPABLE))
    assert close(inference(model, x), before)


def test_the_model_may_be_the_layer() -> None:
    for layer, x in ((conv(), torch.randn(2, 8, 5, 5)), (linear(), torch.randn(4, 8))):
        before = inference(layer, x)
        report = dk.swap_(layer, 2)
        assert [row.name for row in report.swapped] == [""] and "(the model)" in str(report)
        assert close(inference(layer, x), before)


@both_backends
def test_shapes_that_the_layers_take(backend: str) -> None:
    covered = 0
    images_in, rows_in = conv(8, 6), linear(8, 6)
    dk.swap_(images_in, 2, backend=backend)
    dk.swap_(rows_in, 2, backend=backend)
    conv_shapes: tuple[tuple[int, ...], ...] = ((8, 5, 7), (1, 8, 1, 1), (0, 8, 4, 4), (3, 8, 2, 9))
    linear_shapes: tuple[tuple[int, ...], ...] = ((8,), (0, 8), (3, 8), (2, 0, 8), (2, 3, 1, 8))
    for layer, shapes in ((images_in, conv_shapes), (rows_in, linear_shapes)):
        for shape in shapes:
            x = torch.randn(shape)
            swapped = inference(layer, x)
            dk.unswap_(layer)
            plain = inference(layer, x)
            dk.swap_(layer, 2, backend=backend)
            assert swapped.shape == plain.shape and close(swapped, plain), shape
            covered += 1
    columns = torch.randn(8, 30).t()
    assert close(inference(rows_in, columns), inference(rows_in, columns.contiguous()))
    assert covered == 9


@both_backends
def test_wrong_inputs_are_refused(backend: str) -> None:
    model = nn.ModuleList([conv(), linear()])
    dk.swap_(model, 2, backend=backend)
    attempts: tuple[tuple[int, Tensor, str], ...] = (
        (0, torch.randn(1, 9, 5, 5), r"takes 8 channels, given \[1, 9, 5, 5\]"),
        (0, torch.randn(1, 4, 5, 5), "takes 8 channels"),
        (0, torch.randn(9, 5, 5), "takes 8 channels"),
        (0, torch.randn(5, 8), r"images \[B, C, H, W\] or one \[C, H, W\], given \[5, 8\]"),
        (0, torch.randn(1, 1, 8, 5, 5), r"or one \[C, H, W\], given \[1, 1, 8, 5, 5\]"),
        (1, torch.tensor(1.0), r"takes 8 channels, given \[\]"),
        (0, torch.randn(1, 8, 5, 5).double(), "convert one of them"),
        (1, torch.randn(3, 9), r"takes 8 channels, given \[3, 9\]"),
        (1, torch.randn(3, 8).bfloat16(), "convert one of them"),
    )
    for place, x, message in attempts:
        with pytest.raises(ValueError, match=message):
            inference(model[place], x)


def test_report_has_a_row_and_a_reason_for_every_layer() -> None:
    torch.manual_seed(0)

    class Own(nn.Linear):
        pass

    replaced, normed = conv(), nn.utils.parametrizations.weight_norm(conv())
    vars(replaced)["forward"] = lambda x: x
    pruned = conv()
    prune.l1_unstructured(pruned, "weight", 0.1)
    with pytest.warns(FutureWarning):
        old_normed = nn.utils.weight_norm(conv())
    even = nn.Conv2d(8, 8, 2, padding="same")
    sparsify(even)
    integer = linear()
    integer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    twice = conv()
    dk.swap_(twice, 2)
    model = nn.ModuleDict(
        {
            "swapped": conv(),
            "dense": nn.Conv2d(8, 8, 3),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "mirrored": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "even": even,
            "own": Own(8, 8),
            "lazy": nn.LazyConv2d(8, 3),
            "normed": normed,
            "old_normed": old_normed,
            "pruned": pruned,
            "replaced": replaced,
            "filtered": conv(),
            "integer": integer,
            "meta": nn.Linear(8, 8, device="meta"),
            "twice": twice,
            "attention": nn.MultiheadAttention(8, 2),
            "no_layer": nn.BatchNorm2d(8),
        }
    )
    report = dk.swap_(model, 2, filter=lambda name, _: name != "filtered")
    reasons = {row.name: row.skipped for row in report.rows}
    computed = "its weight is computed (weight_norm, pruning, ...): make it a parameter first"
    wanted = {
        "swapped": None,
        "dense": "no remote block has a zero column: a dense layer stays in torch",
        "grouped": STAYS_ON_THE_REFERENCE if extension_status().error else None,
        "mirrored": "padding_mode='reflect': only zeros",
        "even": 'padding="same" of an even window (2, 2) is asymmetric',
        "own": "Own is a class of its own",
        "lazy": "LazyConv2d is a class of its own",
        "normed": "ParametrizedConv2d is a class of its own",
        "old_normed": computed,
        "pruned": computed,
        "replaced": "its forward was replaced on the instance",
        "filtered": "left out by the filter",
        "integer": "its weight is no floating-point tensor",
        "meta": "its weight has no data yet (meta device)",
        "twice": "swapped already (unswap_ first)",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is a class of its own",
    }
    assert reasons == wanted
    taken = [name for name, reason in wanted.items() if reason is None]
    assert [row.name for row in report.swapped] == taken
    assert len(report.skipped) == len(wanted) - len(taken)
    text = str(report)
    for row in report.rows:
        line = next(line for line in text.splitlines() if line.startswith(row.name + " "))
        assert (row.skipped or "cpu") in line or extension_status().error
    assert f"{len(taken)} of {len(wanted)} layers swapped for 2 nodes" in text
    assert "contiguous equal shares" in report.notes[0] and report.notes[0] in text
    row = report.swapped[0]
    assert (row.kind, row.shape, row.density) == ("conv2d", (8, 8, 3, 3), 0.25)
    assert {row.name: row.density for row in report.rows}["dense"] == 1.0


def test_one_node_swaps_nothing() -> None:
    model = small()
    report = dk.swap_(model, 1)
    reasons = {row.name: row.skipped for row in report.rows}
    assert {reasons[name] for name in SWAPPABLE} == {"one node: there is no remote block"}
    assert all(not isinstance(m, SwappedMixin) for m in model.modules())


def test_what_is_no_model_and_no_number_of_nodes() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, given str"):
        dk.swap_("resnet", 2)  # type: ignore[arg-type]
    for nodes in (2.0, "2"):
        with pytest.raises(TypeError, match=f"nodes must be a whole number, given {nodes!r}"):
            dk.swap_(conv(), nodes)  # type: ignore[arg-type]


def test_what_is_no_pattern_and_no_ownership() -> None:
    with pytest.raises(TypeError, match="pattern must be a disco_kernels.Pattern, given dict"):
        dk.swap_(small(), 2, pattern={})  # type: ignore[arg-type]
    one = dk.Ownership.contiguous(8, 2)
    for wrong in (3, {"0": one}, {"0": (one, 3)}, {"0": (one,)}):
        with pytest.raises(TypeError, match=r"ownership must be a dict of layers and their"):
            dk.swap_(small(), 2, ownership=wrong)  # type: ignore[arg-type]


def test_bad_arguments_change_nothing() -> None:
    model = small()
    two = dk.Ownership.contiguous(5, 2)
    attempts: tuple[tuple[dict[str, Any], str], ...] = (
        ({"nodes": 0}, "nodes must be at least 1, given 0"),
        ({"nodes": -2}, "nodes must be at least 1, given -2"),
        ({"nodes": 2, "tolerance": -1.0}, "tolerance must not be negative"),
        ({"nodes": 2, "tolerance": float("nan")}, "tolerance must not be negative, given nan"),
        ({"nodes": 2, "ownership": {"nowhere": (two, two)}}, "does not have: nowhere"),
        ({"nodes": 2, "pattern": dk.Pattern({"no": sparsify(conv())})}, "does not have: no"),
    )
    for arguments, message in attempts:
        with pytest.raises(ValueError, match=message):
            dk.swap_(model, **arguments)
    with pytest.raises(dk.BackendUnavailable, match="cuda: it has no layers"):
        dk.swap_(model, 2, backend="cuda")
    assert dk.unswap_(model) == 0


def test_only_what_is_swapped_needs_the_backend() -> None:
    """A double-precision layer that is left alone anyway is no reason to refuse."""
    model = nn.Sequential(conv(), linear().double())
    if extension_status().error is None:
        assert (
            len(dk.swap_(model, 2, backend="cpu", filter=lambda name, _: name == "0").swapped) == 1
        )
        dk.unswap_(model)
        with pytest.raises(dk.BackendUnavailable, match="bfloat16 only, given torch.float64"):
            dk.swap_(model, 2, backend="cpu")
        assert dk.unswap_(model) == 0
    with pytest.raises(dk.BackendUnavailable, match="'nonsense': no such backend"):
        dk.swap_(nn.Sequential(), 2, backend="nonsense")


def test_hooks_stay_and_run() -> None:
    called: list[str] = []
    model, x = conv(), torch.randn(1, 8, 4, 4)
    x.requires_grad_()
    model.register_forward_pre_hook(lambda *_: called.append("pre"))
    model.register_forward_hook(lambda *_: called.append("forward"))
    model.register_full_backward_pre_hook(lambda *_: called.append("backward pre"))
    model.register_full_backward_hook(lambda *_: called.append("backward"))
    model.register_state_dict_pre_hook(lambda *_: called.append("state pre"))
    model.register_state_dict_post_hook(lambda *_: called.append("state"))
    model.register_load_state_dict_pre_hook(lambda *_: called.append("load pre"))
    model.register_load_state_dict_post_hook(lambda *_: called.append("load"))

    def everything() -> list[str]:
        called.clear()
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(called)

    before = everything()
    assert len(before) == 8
    dk.swap_(model, 2)
    assert everything() == before
    model.register_forward_hook(lambda *_: called.append("later"))
    dk.unswap_(model)
    assert everything() == [*before[:2], "later", *before[2:]]


def test_swapping_twice() -> None:
    model, x = small(), images()
    before = inference(model, x)
    first, second = dk.swap_(model, 2), dk.swap_(model, 2)
    assert len(first.swapped) == len(SWAPPABLE) and not second.swapped
    again = [row for row in second.rows if row.skipped == "swapped already (unswap_ first)"]
    assert [row.name for row in again] == list(SWAPPABLE)
    assert {row.backend for row in again} == {row.backend for row in first.swapped}
    assert close(inference(model, x), before)
    assert dk.unswap_(model) == len(SWAPPABLE)


@needs_extension
def test_grouped_layers_follow_the_others() -> None:
    """They have nothing to skip: alone, or where the reference would run them, they stay."""

    def model() -> nn.Sequential:
        layers = conv(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=2, bias=False)
        return nn.Sequential(*layers).eval()

    x = torch.randn(2, 8, 9, 7)
    together, plain = model(), model()
    before = inference(together, x)
    report = dk.swap_(together, 2)
    assert [(row.name, row.density is None) for row in report.swapped] == [
        ("0", False),
        ("1", True),
        ("2", True),
    ]
    assert isinstance(together[1], nn.Conv2d) and "backend=cpu" in repr(together[1])
    assert close(inference(together, x), before)
    assert close(inference(together[1], x[0]), inference(together[1], x)[0])
    with pytest.raises(ValueError, match=r"takes 8 channels, given \[2, 4, 9, 7\]"):
        inference(together[1], x[:, :4])
    plain[0] = nn.Conv2d(8, 8, 3)
    rows = dk.swap_(plain, 2).rows
    assert [row.skipped for row in rows[1:]] == [
        "grouped: it is swapped with other layers of the model, and there are none to swap"
    ] * 2
    # Nothing is asked of a backend that could refuse: the kernels have no float64.
    assert not dk.swap_(plain.double(), 2, backend="cpu").swapped
    rows = dk.swap_(model(), 2, backend="reference").rows
    assert [row.skipped for row in rows] == [None, *[STAYS_ON_THE_REFERENCE] * 2]
    rows = dk.swap_(model(), 1).rows
    assert {row.skipped for row in rows} == {"one node: there is no remote block"}
    first = model()
    dk.swap_(first, 2, filter=lambda name, _: name == "0")
    assert [row.name for row in dk.swap_(first, 2).swapped] == ["1", "2"]
    assert dk.unswap_(first) == 3 and type(first[1]) is nn.Conv2d


def test_swapped_context() -> None:
    model, x = small(), images()
    before = inference(model, x)
    with pytest.raises(KeyError), dk.swapped(model, nodes=2) as report:
        assert len(report.swapped) == len(SWAPPABLE)
        assert close(inference(model, x), before)
        with dk.swapped(model, 2) as inner:
            assert not inner.swapped
        assert isinstance(model.stem, SwappedConv2d)  # the outer context's
        raise KeyError
    assert type(model.stem) is nn.Conv2d and dk.unswap_(model) == 0
    assert torch.equal(inference(model, x), before)
    with dk.swapped(model, 2, filter=lambda name, _: name == "head", backend="reference"):
        assert [n for n, m in model.named_modules() if dk.backend_of(m) != "torch"] == ["head"]
    dk.swap_(model, 2, filter=lambda name, _: name == "stem")
    with dk.swapped(model, 2) as report:
        assert len(report.swapped) == len(SWAPPABLE) - 1
    assert isinstance(model.stem, SwappedConv2d) and type(model.head) is nn.Linear


def test_ownership_of_the_caller() -> None:
    owned_out, owned_in = (
        dk.Ownership(((6, 1, 3), (0, 2, 4, 5, 7))),
        dk.Ownership(((7, 0), (1, 3, 5, 2, 4, 6))),
    )
    layer = nn.Conv2d(8, 8, 3).eval()
    with torch.no_grad():
        for i, j, kept in ((0, 1, (5,)), (1, 0, ())):
            for o in owned_out.channels[i]:
                layer.weight[o, [k for k in owned_in.channels[j] if k not in kept]] = 0
    x = torch.randn(2, 8, 6, 6)
    model = nn.Sequential(layer)
    before = inference(model, x)
    report = dk.swap_(model, 2, ownership={"0": (owned_out, owned_in)})
    assert report.swapped[0].density == 1 / 8 and not report.notes
    assert layer._disco.pattern.selected == (((), (5,)), ((), ()))  # type: ignore[union-attr]
    assert close(inference(model, x), before)
    dk.unswap_(model)
    three = dk.Ownership.contiguous(8, 3)
    skipped = dk.swap_(model, 2, ownership={"0": (three, three)}).rows[0].skipped
    assert skipped == "its ownership is for 3 nodes, not 2"
    short = dk.Ownership.contiguous(7, 2)
    skipped = dk.swap_(model, 2, ownership={"0": (short, short)}).rows[0].skipped
    assert skipped is not None and "layer '0' has 8 output and 8 input channels" in skipped


def test_recorded_pattern() -> None:
    first, second = conv(), linear()
    model, x = nn.Sequential(first, second), torch.randn(2, 8, 8, 8)
    recorded = dk.Pattern({"0": sparsify(first), "1": sparsify(second)})
    before = inference(model, x)
    report = dk.swap_(model, 2, pattern=recorded)
    assert len(report.swapped) == 2 and not report.notes
    assert close(inference(model, x), before)
    dk.unswap_(model)

    with torch.no_grad():
        first.weight[1, 7, 2, 0] = -0.5
    weights = first.weight.clone()
    report = dk.swap_(model, 2, pattern=recorded)
    assert [row.name for row in report.swapped] == ["1"]
    reason = report.skipped[0].skipped
    assert reason is not None and "block (0, 1) holds |0.5| outside the recorded pattern" in reason
    assert torch.equal(first.weight, weights) and type(first) is nn.Conv2d
    dk.unswap_(model)
    assert len(dk.swap_(model, 2, pattern=recorded, tolerance=0.5).swapped) == 2
    dk.unswap_(model)
    assert "is for 2 nodes, not 3" in str(dk.swap_(model, 3, pattern=recorded))


def test_tolerance_makes_small_columns_zero() -> None:
    layer, x = conv(8, 8, 1), torch.randn(1, 8, 3, 3)
    with torch.no_grad():
        layer.weight[0, 7] = 1e-6
    assert dk.swap_(layer, 2).swapped[0].density == 3 / 8
    dk.unswap_(layer)
    report = dk.swap_(layer, 2, tolerance=1e-6)
    assert report.swapped[0].density == 2 / 8
    with torch.no_grad():
        dropped = layer(x)
        layer.weight[0, 7] = 0
    dk.unswap_(layer)
    assert close(dropped, inference(layer, x))


def test_weights_that_were_changed_in_place_need_repack() -> None:
    model, x = small(), images()
    dk.swap_(model, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert dk.repack_(model) == len(SWAPPABLE)
    swapped = inference(model, x)
    dk.unswap_(model)
    assert close(swapped, inference(model, x), 10)


def test_two_threads_at_once() -> None:
    model = small()
    dk.swap_(model, 2)
    inputs = [images(1 + i % 3) for i in range(40)]
    wanted = [inference(model, x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: inference(model, x), inputs))
    assert sum(close(a, b) for a, b in zip(found, wanted, strict=True)) == 40
    separate = [small(), small()]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda m: dk.swap_(m, 2), separate))
    assert [len(report.swapped) for report in reports] == [len(SWAPPABLE)] * 2


def test_repr_shows_what_happened() -> None:
    model = small()
    dk.swap_(model, 2, backend="reference")
    assert "nodes=2, density=0.000" in repr(model.stem) and "backend=reference" in repr(model.stem)
    assert repr(model.stem).startswith("SwappedConv2d(3, 11, kernel_size=(3, 3)")


def test_a_layer_that_became_something_else_is_not_unswapped() -> None:
    model = nn.Sequential(conv(), linear())
    dk.swap_(model, 2)
    nn.utils.parametrizations.weight_norm(model[1])
    x = torch.randn(2, 8, 8, 8)
    swapped = inference(model, x)
    with pytest.raises(ValueError, match="layer '1' became a ParametrizedSwappedLinear"):
        dk.unswap_(model)
    assert isinstance(model[0], SwappedConv2d)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert dk.unswap_(model) == 2
    assert close(inference(model, x), swapped)
