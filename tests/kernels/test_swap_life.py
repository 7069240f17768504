"""A swapped model lives on: copied, saved, converted, loaded, handed other weights."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status
from disco_kernels.modules import SwappedConv2d, SwappedMixin
from tests.kernels.models import (
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

needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_extension), "reference"]
)


def uses_kernel(model: nn.Module) -> list[str]:
    """Layers whose next inference runs on packed weights."""
    with torch.no_grad():
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, SwappedMixin) and not module._uses_torch(torch.zeros(0))
        ]


def through_pickle(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, nn.Module)
    return copied


def through_torch_save(model: nn.Module, **options: bool) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file, **options)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    assert isinstance(copied, nn.Module)
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    # Fills the tensors after the modules were made.
    "torch.save, legacy": lambda m: through_torch_save(m, _use_new_zipfile_serialization=False),
}


@both_backends
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_swapped_and_independent(backend: str, how: str) -> None:
    model, x, names = small(), images(), swappable(backend)
    dk.swap_(model, 2, backend=backend)
    swapped = inference(model, x)
    twin = COPIES[how](model)
    assert torch.equal(inference(twin, x), swapped)
    assert uses_kernel(twin) == list(names)
    assert list(twin.state_dict()) == list(model.state_dict())
    # Weights of the copy change, and its gradients: the original must not notice.
    twin(x).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert dk.repack_(twin) == len(names)
    assert torch.count_nonzero(inference(twin, x)) == 0
    assert uses_kernel(model) == list(names)
    assert torch.equal(inference(model, x), swapped)
    assert dk.unswap_(twin) == len(names) and isinstance(model.stem, SwappedConv2d)


def test_a_copy_in_training_is_right_in_evaluation() -> None:
    model, x = small(), images()
    dk.swap_(model, 2)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    for how in COPIES.values():
        twin = how(model).eval()
        dense = copy.deepcopy(twin)
        dk.unswap_(dense)
        assert close(inference(twin, x), inference(dense, x), 10)


def test_state_dict_files_do_not_know_of_the_swap() -> None:
    model, x = small(), images()
    dense = inference(model, x)
    file = io.BytesIO()
    dk.swap_(model, 2)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small()
    with torch.no_grad():
        other.stem.weight.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(inference(other, x), dense)


@both_backends
@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_pattern(backend: str, assign: bool) -> None:
    """The new weights need other channels: the packed ones must follow."""
    another = nn.Conv2d(8, 8, 3, padding=1)
    model, other, x = nn.Sequential(conv(8, 8)), nn.Sequential(another), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        another.weight[:4, 4:7] = 0
        another.weight[4:, 1:4] = 0
    dk.swap_(model, 2, backend=backend)
    wanted = inference(other, x)
    result = model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    layer = model[0]
    assert isinstance(layer, SwappedConv2d)
    assert layer._disco.pattern.selected == (((), (7,)), ((0,), ()))
    assert uses_kernel(model) == ["0"]
    assert close(inference(model, x), wanted)
    with pytest.raises(RuntimeError, match=r"[Mm]issing"):
        model.load_state_dict({"0.bias": layer.bias})
    assert close(inference(model, x), wanted)


def test_dtype_and_memory_format() -> None:
    model, x = small(), images()
    dense = inference(model, x)
    dk.swap_(model, 2)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert uses_kernel(model) == list(SWAPPABLE)
    assert close(inference(model, x.contiguous(memory_format=torch.channels_last)), dense)

    registry._said.clear()
    with pytest.warns(RuntimeWarning, match="float64 on cpu runs on the plain-torch reference"):
        model.to(torch.float64)
    assert dk.backend_of(model.stem) == "reference" and uses_kernel(model) == list(SWAPPABLE)
    assert close(inference(model, x.double()).float(), dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.half()
        assert inference(model, x.half()).dtype == torch.float16
        model.bfloat16()
        assert inference(model, x.bfloat16()).dtype == torch.bfloat16
    model.float()
    if extension_status().error is None:
        assert dk.backend_of(model.stem) == "cpu"
    swapped = inference(model, x)
    assert uses_kernel(model) == list(SWAPPABLE)
    dk.unswap_(model)
    assert close(swapped, inference(model, x), 10)


@needs_extension
def test_an_explicit_backend_that_cannot_follow_raises() -> None:
    model = nn.Sequential(linear(), conv())
    dk.swap_(model, 2, backend="cpu")
    with pytest.raises(dk.BackendUnavailable, match="bfloat16 only, given torch.float64"):
        model.double()
    assert not uses_kernel(model[:1])  # nothing runs on weights that were not packed
    model.float()
    assert uses_kernel(model) == ["0", "1"]


def test_meta_device_and_back() -> None:
    model, x = small(), images()
    dk.swap_(model, 2)
    dense, state = inference(model, x), model.state_dict()
    model.to("meta")
    assert inference(model, torch.empty(3, 3, 9, 8, device="meta")).shape == (3, 5)
    assert not uses_kernel(model)
    model.to_empty(device="cpu").load_state_dict(state)
    assert uses_kernel(model) == list(SWAPPABLE)
    assert close(inference(model, x), dense)


def test_weights_handed_over_for_one_call() -> None:
    model, x = small(), images()
    dk.swap_(model, 2)
    before = inference(model, x)
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        handed = torch.func.functional_call(model, weights, (x,))
    assert torch.equal(inference(model, x), before)
    dk.unswap_(model)
    with torch.no_grad():
        assert close(handed, torch.func.functional_call(model, weights, (x,)), 100)


def test_an_assigned_weight_is_used() -> None:
    layer, x = conv(), torch.randn(1, 8, 4, 4)
    dk.swap_(layer, 2)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert not uses_kernel(layer)
    wanted = inference(lambda v: nn.functional.conv2d(v, layer.weight, layer.bias, padding=1), x)
    assert close(inference(layer, x), wanted)
    layer.eval()
    assert uses_kernel(layer) == [""]
    assert close(inference(layer, x), wanted)


def test_folding_batch_norm_into_a_swapped_layer() -> None:
    """torch's own fusion copies the layer and assigns other weights to the copy."""
    layer, norm, x = conv(), nn.BatchNorm2d(8), torch.randn(2, 8, 5, 5)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    norm.eval()
    wanted = inference(lambda v: norm(layer(v)), x)
    dk.swap_(layer, 2)
    fused = nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    assert close(inference(fused, x), wanted, 10)


def test_pruning_a_swapped_layer() -> None:
    from torch.nn.utils import prune

    layer, x = conv(), torch.randn(1, 8, 4, 4)
    dk.swap_(layer, 2)
    prune.random_unstructured(layer, "weight", 0.5)
    live: Tensor = layer.weight
    assert close(
        inference(layer, x),
        inference(lambda v: nn.functional.conv2d(v, live, layer.bias, padding=1), x),
    )
    prune.remove(layer, "weight")
    assert dk.unswap_(layer) == 1


def test_tied_weights() -> None:
    first, second = linear(), linear()
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(3, 8)
    before = inference(model, x)
    assert len(dk.swap_(model, 2).swapped) == 2
    assert close(inference(model, x), before)
    model(x).sum().backward()
    assert not uses_kernel(model)
    dk.unswap_(model)
    assert torch.equal(inference(model, x), before)


def test_frozen_weights() -> None:
    model, x = small(), images()
    model.requires_grad_(False)
    before = model(x)
    dk.swap_(model, 2)
    assert close(model(x), before) and not model(x).requires_grad
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert uses_kernel(model) == list(SWAPPABLE)
    dk.unswap_(model)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    assert close(gradient, wanted, 10)


def test_in_inference_mode() -> None:
    model, x = small(), images()
    before = inference(model, x)
    with torch.inference_mode():
        dk.swap_(model, 2)
        assert close(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        assert close(model(x), before)


def test_sparsify_helper_keeps_its_word() -> None:
    layer = nn.Linear(10, 6)
    pattern = sparsify(layer, density=0.4)
    assert pattern.density == 0.4
    assert dk.contradiction("", pattern, layer.weight) is None
