"""Parts of a model on the nodes, the rest in torch: drop-ins, a detector included."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import disco
from disco import Cluster
from disco.errors import InputError
from disco.zoo import build_model
from tests.partition.zoo import NODES, cluster_of


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 2, 1)
        self.b = nn.Conv2d(8, 8, 3, 1, 1)
        self.c = nn.Conv2d(8, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        b = torch.relu(self.b(torch.relu(self.a(x))))
        return OrderedDict([("0", b), ("1", torch.relu(self.c(b)))])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(6, 5, 1)])

    def forward(self, maps: list[Tensor], *, scale: float = 1.0) -> dict[str, Tensor]:
        rows = [conv(x).flatten(2) for conv, x in zip(self.convs, maps, strict=True)]
        return {"scores": torch.cat(rows, 2) * scale}


class Detector(nn.Module):
    """Lists of images in; what comes out depends on the data, which nothing can export."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = Head()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = self.backbone(torch.stack(images))
        scores = self.head(list(features.values()), scale=2.0)["scores"]
        return [row[row > row.mean()] for row in scores]


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_detector_gives_the_same_detections(detector: Detector, nodes: int) -> None:
    images = [torch.randn(3, 12, 16) for _ in range(3)]
    with pytest.raises(InputError, match="cannot be captured .*partition_submodules_"):
        disco.partition(detector, (images,))
    inputs = disco.submodule_inputs(detector, ["backbone"], (images[:1],))
    pattern = disco.sparsify_(detector.backbone, nodes, 0.5, inputs["backbone"].args)
    expected = detector(images)
    parts = disco.partition_submodules_(
        detector, ["backbone", "head"], (images[:1],), nodes, patterns={"backbone": pattern}
    )
    assert list(parts) == ["backbone", "head"] and detector.head is parts["head"]
    found = detector(images)
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_nothing_is_replaced_if_one_part_fails(detector: Detector) -> None:
    class Odd(nn.Module):
        def forward(self, maps: list[Tensor], scale: float) -> dict[str, Tensor]:
            return {
                "scores": maps[0].flatten(2) if float(maps[0].sum()) > 0 else maps[0].flatten(2) * 2
            }

    detector.head = Odd()  # type: ignore[assignment]
    backbone = detector.backbone
    with pytest.raises(InputError, match=r"Odd cannot be captured"):
        disco.partition_submodules_(detector, ["backbone", "head"], ([torch.randn(3, 8, 8)],))
    assert detector.backbone is backbone


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbones"], "no submodule 'backbones'; its own are backbone, head, unused"),
        ([""], "no submodule ''"),
        ("backbone", "must be a list of submodules"),
        ([], "must be a list of submodules"),
        (["backbone", "backbone.a"], "'backbone.a' is inside 'backbone'"),
        (["unused"], "does not call its submodule 'unused'"),
    ],
)
def test_wrong_names(detector: Detector, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        disco.partition_submodules_(detector, names, ([torch.randn(3, 8, 8)],))


def _name(nodes: int | Cluster) -> str:
    return str(nodes) if isinstance(nodes, int) else f"uneven-{nodes.world_size}"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("nodes", [*NODES, *map(cluster_of, NODES)], ids=_name)
def test_ssd300(nodes: int | Cluster) -> None:
    """Backbone and head on the nodes; matching and suppression stay in torch."""
    model = build_model("torchvision", "ssd300_vgg16")
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in [(300, 300), (200, 260)]]
    inputs = disco.submodule_inputs(model, ["backbone"], (images[:1],))
    backbone = model.get_submodule("backbone")
    pattern = disco.sparsify_(backbone, nodes, 0.2, inputs["backbone"].args)
    expected = model(images)
    parts = disco.partition_submodules_(
        model, ["backbone", "head"], (images[:1],), nodes, patterns={"backbone": pattern}
    )
    assert not any(part.plan.replicated for part in parts.values())
    for found, exact in zip(model(images), expected, strict=True):
        _check_same_detections(found, exact)


def _check_same_detections(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each has its like in the other; those whose scores differ by less than rounding may swap."""
    assert found["labels"].shape == exact["labels"].shape
    same = found["labels"][:, None] == exact["labels"][None]
    for key in ("boxes", "scores"):
        a, b = (x[key].reshape(len(x[key]), -1) for x in (found, exact))
        off = (a[:, None] - b[None]).abs().amax(-1)
        same &= off <= 1e-5 * float(b.abs().max())
    assert bool(same.any(0).all()) and bool(same.any(1).all())
