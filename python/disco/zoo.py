"""Models by name, out of torchvision, timm or here, with weights of a file or random ones."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from disco.detector_heads import SUFFIX as HEADS
from disco.detector_heads import DetectorHeads
from disco.errors import InputError
from disco.small_models import SMALL_MODELS, base_name, small_model
from disco.torchvision_compat import import_torchvision

SOURCES = ("torchvision", "timm", "disco")
_CLASSES = 10  # of the small models, where nobody says how many
_MANY = 3  # keys named in a message; more would not make it clearer


def build_model(
    source: str,
    name: str,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    image_size: int = 32,
) -> nn.Module:
    """Build a model in `eval()` mode, in float32 on the CPU.

    Args:
        source: "torchvision", "timm", or "disco" for the small models of `disco.small_models`.
        name: the model's name there, "resnet50"; "ssd300_vgg16:heads" is the network in an SSD of
            torchvision (see `disco.detector_heads`).
        weights: a `.safetensors`, `.pth` or `.pt` file with a state dict of exactly this model;
            None leaves the weights as the model's own initialisation drew them.
        seed: of torch's generator while the model is made; the caller's generator is not touched.
        num_classes: outputs of the classifier; None for as many as the source gives it.
        image_size: side of the images in pixels, for those small models that depend on it.

    Raises:
        InputError: unknown source or name, a file that does not fit, or a model that takes no
            number of classes.
    """
    make = _factory(source, name, num_classes, image_size)
    # Read first: a bad file should not wait for a large model to be initialised.
    state = None if weights is None else read_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make()
        except TypeError as error:
            if num_classes is None:
                raise
            raise InputError(
                f"{source} {name} cannot be made with {num_classes} classes ({error}): choose a "
                "classifier"
            ) from error
    if state is not None:
        _load_strictly(model, state, f"{source} {name}", Path(str(weights)))
    return model.eval()


def full_name(model: str) -> str:
    """A model's name with its source before it, "torchvision:resnet50".

    Args:
        model: a name with a source stays as it is, and so does that of a small model ("resnet8");
            others are looked for in torchvision and then in timm, where they are installed.

    Raises:
        InputError: none of them has it, or the source before it is unknown.
    """
    named, colon, _ = model.removesuffix(HEADS).partition(":")
    if (colon and named in SOURCES) or base_name(model) in SMALL_MODELS:
        return model
    if colon:
        raise _unknown_source(named)
    known: list[str] = list(SMALL_MODELS)
    missing = []
    for source in SOURCES[:2]:
        if importlib.util.find_spec(source) is None:
            missing.append(source)
            continue
        names = _names_of(source)
        if model.removesuffix(HEADS) in names:
            return f"{source}:{model}"
        known += names
    where = f" ({' and '.join(missing)} not being installed)" if missing else ""
    raise InputError(
        f"there is no model {model!r} here, in torchvision or in timm{where}: "
        f"{_suggestion(model, known)}"
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict without running anything that the file contains.

    `.safetensors`, or `.pth` and `.pt` through `torch.load(weights_only=True)`; there, a dict under
    "state_dict" or "model" is taken out of a training checkpoint. Raises InputError.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"the weights file {path} is not a whole safetensors file ({error}): "
                "copy it again from where it came"
            ) from error
    if path.suffix not in (".pth", ".pt"):
        raise InputError(
            f"the weights file {path} ends in {path.suffix!r}; .safetensors, .pth and .pt are "
            "read: convert it to one of them"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights file {path} holds more than plain tensors (a pickled model or other "
            "objects), and only plain tensors are loaded: save the model's state_dict() and give "
            "that"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the weights file {path} is damaged or not written by torch.save "
            f"({_first_line(error)}): copy it again from where it came"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise InputError(
            f"the weights file {path} does not hold a state dict of plain tensors: "
            "save the model's state_dict() and give that"
        )
    return dict(loaded)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's state dict as safetensors."""
    # Tied parameters share memory, which the format refuses.
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(path: str | Path | None) -> str | None:
    """SHA-256 of a weights file's bytes, None for no file. InputError if it is not there."""
    if path is None:
        return None
    _check_file(Path(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def category_names(num_classes: int) -> list[str] | None:
    """ImageNet's class names if `num_classes` is 1000 and torchvision is there, else None."""
    if num_classes != 1000 or importlib.util.find_spec("torchvision") is None:
        return None
    import_torchvision()
    meta = importlib.import_module("torchvision.models._meta")
    return list(meta._IMAGENET_CATEGORIES)


def _factory(
    source: str, name: str, num_classes: int | None, image_size: int
) -> Callable[[], nn.Module]:
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if source == "torchvision":
        models = import_torchvision().models
        whole = name.removesuffix(HEADS)
        _check_name(source, whole, _names_of(source))
        if whole != name:
            # Detectors of torchvision count the background.
            classes = None if num_classes is None else num_classes + 1
            detector = _factory(source, whole, classes, image_size)
            return lambda: DetectorHeads(detector(), image_size)
        builder = models.get_model_builder(name)
        options["weights"] = None
        # Without this, a detection or segmentation model downloads its backbone's weights.
        if "weights_backbone" in inspect.signature(builder).parameters:
            options["weights_backbone"] = None
        return lambda: builder(**options)
    if source == "timm":
        if importlib.util.find_spec("timm") is None:
            raise InputError(
                "this needs timm, which is not installed: install it with `pip install timm`"
            )
        _check_name(source, name, _names_of(source))
        timm = importlib.import_module("timm")
        return lambda: timm.create_model(name, pretrained=False, **options)
    if source == "disco":
        _check_name(source, base_name(name), list(SMALL_MODELS))
        small = small_model(name)
        return lambda: small(num_classes or _CLASSES, image_size)
    raise _unknown_source(source)


def _unknown_source(source: str) -> InputError:
    return InputError(
        f"the model source {source!r} is unknown: choose {', '.join(SOURCES[:-1])} or {SOURCES[-1]}"
    )


def _names_of(source: str) -> list[str]:
    """Of the models of torchvision or timm."""
    torchvision = import_torchvision()  # timm imports it
    if source == "torchvision":
        return list(torchvision.models.list_models())
    return list(importlib.import_module("timm").list_models())


def _check_name(source: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise InputError(f"{source} has no model {name!r}: {_suggestion(name, known)}")


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"of {len(known)} none is like it"


def _load_strictly(model: nn.Module, state: dict[str, Tensor], what: str, path: Path) -> None:
    expected = model.state_dict()
    problems = [
        _some("missing", [key for key in expected if key not in state]),
        _some("unexpected", [key for key in state if key not in expected]),
        _some(
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
                for key in expected
                if key in state and state[key].shape != expected[key].shape
            ],
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise InputError(
            f"the weights file {path} is not one of {what}: {'; '.join(found)}. "
            "Give this model's weights, or the model that the weights belong to"
        )
    model.load_state_dict(state)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no weights file {path}: give a .safetensors, .pth or .pt file")


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _MANY} more" if len(keys) > _MANY else ""
    return f"{len(keys)} {what} ({', '.join(keys[:_MANY])}{more})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
