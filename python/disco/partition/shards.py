"""The artifact: a directory with `manifest.json` and one `rank-<r>.safetensors` per rank.

A node reads the manifest and its own shard, nothing else. No pickle, nothing executable. The same
plan and weights give byte-identical files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from disco.errors import InputError
from disco.partition.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    PathLike,
    ShardFile,
    load_manifest,
    manifest_bytes,
    path_of,
)
from disco.partition.plan import Plan
from disco.partition.rank_builder import RankProgram
from disco.program import Program, program_from_json, program_to_json

# One metadata entry with JSON in it: safetensors writes several in an order that changes by run.
_METADATA_KEY = "disco"
_LIBRARIES = ("disco-kernels", "torch", "safetensors")

__all__ = ["Manifest", "Shard", "ShardFile", "load_manifest", "load_shard", "save_artifact"]


@dataclass(frozen=True)
class Shard:
    """One rank's shard."""

    rank: int
    world_size: int
    plan_digest: str
    program: Program
    weights: dict[str, Tensor]


def save_artifact(
    directory: PathLike,
    plan: Plan,
    ranks: Sequence[RankProgram],
    model_description: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the artifact. The directory appears whole or not at all.

    Args:
        directory: must not exist; with `overwrite`, may be an artifact or an empty directory.
        plan, ranks: of one partition.
        model_description: anything in JSON that tells a reader which model this is.

    Raises:
        InputError: the directory exists, its parent does not, the description is no JSON, or the
            disk refuses (it is full, say): nothing is left of what was written.
    """
    target = path_of(directory)
    check_target(target, overwrite)
    try:
        model = json.loads(json.dumps(dict(model_description or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the model description must be plain JSON: {error}") from None
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        shards = [_write_shard(partial, rank, part, plan) for rank, part in enumerate(ranks)]
        content = {
            "format": "disco-artifact",
            "version": list(FORMAT_VERSION),
            "plan": json.loads(plan.to_json()),
            "plan_digest": plan.digest,
            "model": model,
            "shards": [
                {"rank": s.rank, "file": s.file, "sha256": s.sha256, "bytes": s.num_bytes}
                for s in shards
            ],
            "libraries": _library_versions(),
        }
        _write(partial / MANIFEST, manifest_bytes(content))
        _put_in_place(partial, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{target} cannot be written: {error}: free some space, or choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_shard(directory: PathLike, rank: int) -> Shard:
    """Read the manifest and this rank's shard, and no other shard.

    Raises:
        InputError: the rank is outside the plan, the shard is missing, changed, cut short, or of
            another plan.
    """
    manifest = load_manifest(directory)
    world_size = manifest.plan.world_size
    if not 0 <= rank < world_size:
        raise InputError(
            f"rank {rank} is outside the plan in {os.fspath(directory)}, which has {world_size} "
            f"ranks: give 0 to {world_size - 1}"
        )
    entry = manifest.shards[rank]
    path = path_of(directory) / f"rank-{rank}.safetensors"
    if entry.file != path.name:
        raise InputError(
            f"{path.parent / MANIFEST} is damaged: rank {rank} has file {entry.file!r}"
        )
    plan_digest = manifest.plan.digest
    try:
        if not path.is_file():
            raise InputError(
                f"there is no shard {path}: copy it from where the model was partitioned"
            )
        found = _sha256(path)
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read: {error.strerror}") from None
    if found != entry.sha256:
        raise InputError(_why_changed(path, entry, found, plan_digest))
    metadata = _metadata(path)
    if metadata is None:
        raise InputError(f"{path} is not a shard: it has no description of its program")
    if metadata["plan_digest"] != plan_digest or metadata["rank"] != rank:
        raise InputError(_another_plan(path, metadata, plan_digest, rank))
    program = program_from_json(metadata["program"])
    weights = safetensors.torch.load_file(path)
    missing = [name for name in program.weight_names() if name not in weights]
    if missing:
        raise InputError(f"{path} lacks weight {missing[0]!r} of its program: partition again")
    return Shard(rank, world_size, plan_digest, program, weights)


def _write_shard(folder: Path, rank: int, part: RankProgram, plan: Plan) -> ShardFile:
    path = folder / f"rank-{rank}.safetensors"
    description = {
        "version": list(FORMAT_VERSION),
        "rank": rank,
        "world_size": plan.world_size,
        "plan_digest": plan.digest,
        "program": program_to_json(part.program),
    }
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    # safetensors makes files that only their owner may read; a shard follows the umask.
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(part.weights, path, metadata={_METADATA_KEY: text})
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return ShardFile(rank, path.name, _sha256(path), path.stat().st_size)


def _metadata(path: Path) -> dict[str, Any] | None:
    """A shard's own description, None if the file has none that can be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_METADATA_KEY])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RecursionError):
        return None
    fits = isinstance(content, dict) and {"plan_digest", "rank", "program"} <= set(content)
    return content if fits else None


def _why_changed(path: Path, entry: ShardFile, found: str, plan_digest: str) -> str:
    metadata = _metadata(path)
    if metadata is not None and (metadata["plan_digest"], metadata["rank"]) != (
        plan_digest,
        entry.rank,
    ):
        return _another_plan(path, metadata, plan_digest, entry.rank)
    size = path.stat().st_size
    what = "is damaged" if size == entry.num_bytes else f"has {size} of {entry.num_bytes} bytes"
    return (
        f"the shard {path} {what}: its sha256 is {found[:16]}..., the manifest says "
        f"{entry.sha256[:16]}...: copy it again"
    )


def _another_plan(path: Path, metadata: Mapping[str, Any], plan_digest: str, rank: int) -> str:
    return (
        f"{path} is rank {metadata['rank']} of the plan {str(metadata['plan_digest'])[:12]}; the "
        f"manifest wants rank {rank} of the plan {plan_digest[:12]}: copy the shard that was "
        f"written with it"
    )


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a directory that `save_artifact` could not or should not write. Raises InputError."""
    if not target.parent.is_dir():
        raise InputError(
            f"there is no directory {target.parent} to write {target.name!r} into: make it"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{target.parent} may not be written: choose another directory")
    try:
        exists = target.exists()
    except OSError as error:  # of a name that is too long
        raise InputError(f"{target} cannot be written: {error.strerror}") from error
    if not exists and not target.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{target} exists: choose another directory, or allow overwriting it")
    replaceable = target.is_dir() and not target.is_symlink()
    if not replaceable or not ((target / MANIFEST).is_file() or not any(target.iterdir())):
        raise InputError(
            f"{target} is not a partitioned model, so it is not overwritten: remove it"
        )


def _put_in_place(partial: Path, target: Path) -> None:
    """A rename, so that nobody ever sees half an artifact; an old one is moved away first."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _library_versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"  # running from a source tree
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
