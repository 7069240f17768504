"""`manifest.json`: the plan, what the model is, and the digests of the shards and of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco.errors import InputError
from disco.partition.plan import Plan
from disco.partition.typed import check_types

# Readers take every minor version of their own major up to their own minor.
# Since 1.1 a manifest has a digest of itself.
FORMAT_VERSION = (1, 1)
MANIFEST = "manifest.json"

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ShardFile:
    """What the manifest says of one shard."""

    rank: int
    file: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
        plan: of all ranks.
        model: description of the model, as given when saving (JSON).
        shards: per rank.
        libraries: versions that wrote the artifact.
    """

    plan: Plan
    model: Mapping[str, Any]
    shards: tuple[ShardFile, ...]
    libraries: Mapping[str, str]
    version: tuple[int, int] = FORMAT_VERSION


def path_of(directory: PathLike) -> Path:
    """InputError for what names no directory."""
    try:
        return Path(directory)
    except TypeError:
        raise InputError(f"a directory must be a str or a path, given {directory!r}") from None


def load_manifest(directory: PathLike) -> Manifest:
    """Read `manifest.json` only. InputError if it is missing, damaged or of an unknown version."""
    path = path_of(directory) / MANIFEST
    try:
        return _read(path)
    except RecursionError:
        raise InputError(f"{path} is damaged: it is nested too deeply") from None


def _read(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"there is no {path}: give a directory that `partition(...).save` has written"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): copy the artifact again") from None
    if not isinstance(content, dict) or content.get("format") != "disco-artifact":
        raise InputError(f"{path} is not the manifest of a partitioned model")
    _check_version(content.get("version"), path)
    _check_digest(content, path)
    try:
        plan = Plan.from_json(json.dumps(content["plan"]))
        shards = tuple(
            ShardFile(s["rank"], s["file"], s["sha256"], s["bytes"]) for s in content["shards"]
        )
        for shard in shards:
            check_types(shard)
        model, libraries, digest = content["model"], content["libraries"], content["plan_digest"]
        for part in (model, libraries):
            if not isinstance(part, dict):
                raise TypeError(f"{part!r:.60} where a description is needed")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from None
        raise InputError(f"{path} is damaged ({error!r}): copy the artifact again") from None
    if digest != plan.digest:
        raise InputError(
            f"{path} is damaged: its plan has digest {plan.digest[:12]}, it says "
            f"{str(digest)[:12]}: copy the artifact again"
        )
    if [s.rank for s in shards] != list(range(plan.world_size)):
        raise InputError(
            f"{path} is damaged: it lists {len(shards)} shards of {plan.world_size} ranks"
        )
    return Manifest(plan, model, shards, libraries, tuple(content["version"]))


def manifest_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a manifest's JSON without the digest itself."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(_json(rest).encode()).hexdigest()


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The file: one line of JSON, with the digest."""
    return (_json({**content, "digest": manifest_digest(content)}) + "\n").encode()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _check_digest(content: Mapping[str, Any], path: Path) -> None:
    """Those of format 1.0 have none."""
    given, found = content.get("digest"), manifest_digest(content)
    if given != found and (given is not None or content["version"] != [1, 0]):
        raise InputError(
            f"{path} is damaged: its digest is {found[:12]}, it says {str(given)[:12]}: copy the "
            f"artifact again"
        )


def _check_version(given: Any, path: Path) -> None:
    known = isinstance(given, list) and [type(part) for part in given] == [int, int]
    if not known or given[0] != FORMAT_VERSION[0] or given[1] > FORMAT_VERSION[1]:
        text = ".".join(map(str, given)) if isinstance(given, list) else repr(given)
        major, minor = FORMAT_VERSION
        raise InputError(
            f"{path} has format version {text}; this release reads {major}.0 to {major}.{minor}: "
            f"install the release that wrote it, or partition the model again"
        )
