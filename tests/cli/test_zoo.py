"""Models by name, and weights files that are right, wrong, damaged or dangerous."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from disco.errors import InputError
from disco.zoo import build_model, category_names, full_name, read_state_dict, state_digest

NAME = "squeezenet1_1"


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    digests = [
        state_digest(build_model("torchvision", NAME, seed=s).state_dict()) for s in (3, 3, 4)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("resnet8", "resnet8"),
        ("deit_micro-w80", "deit_micro-w80"),
        ("resnet50", "torchvision:resnet50"),  # timm has one, too
        ("deit_tiny_patch16_224", "timm:deit_tiny_patch16_224"),
        ("ssd300_vgg16:heads", "torchvision:ssd300_vgg16:heads"),
        ("timm:resnet50", "timm:resnet50"),
        ("torchvision:nothing", "torchvision:nothing"),  # said when it is to be built
    ],
)
def test_names_without_a_source(given: str, expected: str) -> None:
    assert full_name(given) == expected


def test_names_that_no_source_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no model 'resnet51'.*did you mean .*resnet50"):
        full_name("resnet51")
    with pytest.raises(
        InputError, match="source 'tf' is unknown: choose torchvision, timm or disco"
    ):
        full_name("tf:resnet50")
    monkeypatch.setattr("disco.zoo.importlib.util.find_spec", lambda name: None)
    assert full_name("resnet20") == "resnet20"
    with pytest.raises(InputError, match=r"\(torchvision and timm not being installed\)"):
        full_name("resnet50")


def test_timm() -> None:
    assert build_model("timm", "resnet10t")(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_model_with_a_backbone_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    build_model("torchvision", "lraspp_mobilenet_v3_large")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_file(suffix: str, wrapped: bool, tmp_path: Path) -> None:
    state = build_model("torchvision", NAME, seed=5).state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    model = build_model("torchvision", NAME, weights=path)
    assert state_digest(model.state_dict()) == state_digest(state)
    assert not model.training


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="no model 'resnet51': did you mean resnet50"):
        build_model("torchvision", "resnet51")
    with pytest.raises(
        InputError, match="source 'hub' is unknown: choose torchvision, timm or disco"
    ):
        build_model("hub", "resnet50")


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(build_model("timm", "resnet10t").state_dict(), path)
    with pytest.raises(InputError) as caught:
        build_model("torchvision", NAME, weights=path)
    message = str(caught.value)
    assert (
        "52 missing (features.0.weight, features.0.bias, features.3.squeeze.weight and" in message
    )
    assert "unexpected (" in message and "\n" not in message and len(message) < 600


def test_weights_of_another_shape(tmp_path: Path) -> None:
    state = build_model("torchvision", NAME).state_dict()
    state["classifier.1.weight"] = state["classifier.1.weight"][:10].clone()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"classifier\.1\.weight \(10, 512, 1, 1\) instead of"):
        build_model("torchvision", NAME, weights=tmp_path / "w.safetensors")


def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"w": Payload(str(trap))}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds more than plain tensors") as caught:
        read_state_dict(tmp_path / "w.pth")
    assert not trap.exists()
    assert "\n" not in str(caught.value)


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(InputError, match="save the model's state_dict"):
        read_state_dict(tmp_path / "w.pth")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not hold a state dict of plain tensors"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_a_cut_weights_file(suffix: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = {"w": torch.randn(1000)}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"w\.(safetensors|pth)") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no weights file"):
        read_state_dict(tmp_path / "w.pth")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(InputError, match=r"ends in '.onnx'"):
        read_state_dict(tmp_path / "w.onnx")


def test_category_names() -> None:
    names = category_names(1000)
    assert names is not None and len(names) == 1000 and names[0] == "tench"
    assert category_names(10) is None
