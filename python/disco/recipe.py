"""How a partitioned model was made, so that the whole model can be made again and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disco_kernels as dk
from disco import api
from disco.errors import InputError
from disco.images import Preprocessing
from disco.partition import Cluster, Node
from disco.zoo import build_model, state_digest, weights_digest


@dataclass(frozen=True)
class Recipe:
    """A model out of the zoo and what was done to it.

    Attributes:
        source, name: of the zoo, "torchvision" and "resnet50".
        seed: of the random weights; unused with a weights file.
        weights_sha256: of the weights file, None if the weights are random.
        density: one-shot magnitude sparsification at this density, None if there was none.
        nodes: number of nodes.
        preprocessing: how photographs become inputs.
        cluster: the nodes, None for equal ones.
        group_size: channels that the sparsification chose at a time.
        num_classes: of the classifier; None for as many as the source gives it.
    """

    source: str
    name: str
    nodes: int
    seed: int = 0
    weights_sha256: str | None = None
    density: float | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    cluster: Cluster | None = None
    group_size: int = 1
    num_classes: int | None = None

    @property
    def example_input(self) -> Tensor:
        """Zeros, float32 [1, 3, size, size]."""
        return torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size)

    def build_dense(self, weights: str | Path | None) -> nn.Module:
        """The model as the zoo and the weights file have it, in `eval()` mode."""
        return build_model(
            self.source,
            self.name,
            weights=weights,
            seed=self.seed,
            num_classes=self.num_classes,
            image_size=self.preprocessing.size,
        )

    def sparsify_(self, model: nn.Module) -> dk.Pattern | None:
        """Give the model its structure in place, if the recipe says so, and return its pattern."""
        if self.density is None:
            return None
        return api.sparsify_(
            model,
            self.cluster or self.nodes,
            self.density,
            (self.example_input,),
            group_size=self.group_size,
        )

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """The manifest's model description; `model` is the finished one."""
        return {
            "source": self.source,
            "name": self.name,
            "nodes": self.nodes,
            "seed": self.seed,
            "weights_sha256": self.weights_sha256,
            "density": self.density,
            "group_size": self.group_size,
            "num_classes": self.num_classes,
            "input": self.preprocessing.to_json(),
            "cluster": None if self.cluster is None else [asdict(n) for n in self.cluster.nodes],
            "state_sha256": state_digest(model.state_dict()),
        }

    @classmethod
    def from_description(cls, data: Mapping[str, Any] | None, where: str | Path) -> Recipe:
        """The inverse of `describe`. Raises InputError if the description is absent or unusable."""
        if not data:
            raise InputError(
                f"the partition in {where} does not say which model it is of: "
                "only one made by `disco partition` does"
            )
        try:
            return cls(
                source=str(data["source"]),
                name=str(data["name"]),
                nodes=int(data["nodes"]),
                seed=int(data["seed"]),
                weights_sha256=data["weights_sha256"],
                density=None if data["density"] is None else float(data["density"]),
                preprocessing=Preprocessing.from_json(data["input"]),
                cluster=_cluster(data.get("cluster")),
                group_size=int(data.get("group_size", 1)),
                num_classes=None if data.get("num_classes") is None else int(data["num_classes"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"the model description in {where} is not usable ({error!r}): "
                "partition the model again"
            ) from error


def _cluster(nodes: Any) -> Cluster | None:
    return None if nodes is None else Cluster([Node.from_plain(node) for node in nodes])


def rebuild(
    data: Mapping[str, Any] | None, where: str | Path, weights: str | Path | None
) -> nn.Module:
    """Make the whole model again that a manifest describes.

    Args:
        data: the manifest's model description.
        where: the partition's folder, for messages.
        weights: the weights file that it was made from, None if it was made from random weights.

    Raises:
        InputError: no description, the wrong weights file, or a result that is not that model.
    """
    recipe = Recipe.from_description(data, where)
    _check_weights(recipe, where, weights)
    model = recipe.build_dense(weights)
    recipe.sparsify_(model)
    assert data is not None
    if state_digest(model.state_dict()) != data.get("state_sha256"):
        raise InputError(
            f"{recipe.source} {recipe.name} made again is not the model in {where}: another "
            "version of torch or of the model source draws other random weights; use the versions "
            "in its manifest, or partition the model again"
        )
    return model


def _check_weights(recipe: Recipe, where: str | Path, weights: str | Path | None) -> None:
    if recipe.weights_sha256 is None:
        if weights is not None:
            raise InputError(
                f"--weights {weights} was given, and the model in {where} has random weights of "
                f"seed {recipe.seed}: leave --weights out"
            )
        return
    if weights is None:
        raise InputError(
            f"the model in {where} was made from a weights file: give the same with --weights FILE"
        )
    found = weights_digest(weights)
    if found is not None and found != recipe.weights_sha256:
        raise InputError(
            f"the weights file {weights} (SHA-256 {found[:12]}) is not the one that the model in "
            f"{where} was made from ({recipe.weights_sha256[:12]}): give that one"
        )
