"""`pressd/manifest.json`: what an artifact is, how it was made and how good it is. No torch.

Its presence means that the artifact is complete: it is written last, to a temporary name that is then renamed. The id
is a digest of the files a loader reads; quality can be measured later and does not change it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pressd.runtime.artifact.errors import ArtifactError

FOLDER = "pressd"
NAME = "manifest.json"
SCHEMA: Literal[1] = 1
_MAX_BYTES = 64 << 20


def _plain_name(name: str) -> str:
    """A file directly in the artifact: nothing absolute, nothing in another directory."""
    if name in ("", ".", "..") or PurePosixPath(name).name != name or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r} must be a plain name inside the artifact")
    return name


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_plain_name)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


class StoredFile(_Part):
    """One file's size in bytes and digest."""

    bytes: Count
    sha256: Digest


class Tool(_Part):
    """What wrote the artifact."""

    name: str
    version: str
    torch: str


class Source(_Part):
    """The dense checkpoint that was pressed: where it was and what its files were."""

    path: str
    files: dict[FileName, StoredFile]


class Recipe(_Part):
    """The recipe's text as it was given (the equivalent one for a bare scheme), and its digest."""

    text: str
    sha256: Digest


class PlannedGroup(_Part):
    """One fused group as stored. `bits` are stored bits per weight, `error` is ||W - W'|| / ||W|| (Frobenius).

    `output_error` is the same of the outputs, for the inputs that the calibration text gave it; None without text.
    `passes` are those that it went through, `notes` what a reader should know of how they went, and `fallback` what
    was done instead of the last of them, and why.
    """

    name: str
    members: tuple[str, ...]
    scheme: str
    shape: tuple[Count, Count]
    bits: float
    error: float
    output_error: float | None = None
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fallback: str | None
    bytes: Count


class Totals(_Part):
    """Sizes of the weights: `bytes` are of the weight files, `dense_bytes` of the source's tensors in its precision.

    `bpw` is the stored bits of the pressed linears, scales included, over their weights; None if nothing was pressed.
    """

    params: Count
    dense_bytes: Count
    bytes: Count
    ratio: float
    bpw: float | None


class Manifest(_Part):
    """Everything known about one artifact; `calibration` says which text was looked at, and is empty if none was."""

    schema_version: Annotated[Literal[1], Field(validation_alias="schema", serialization_alias="schema")]
    id: Digest
    tool: Tool
    source: Source
    recipe: Recipe
    calibration: dict[str, object] = {}
    plan: tuple[PlannedGroup, ...]
    files: dict[FileName, StoredFile]
    totals: Totals
    quality: dict[str, object]
    gates: dict[str, float]
    requires: dict[str, str]
    loads_in: dict[str, str]

    def to_json(self) -> str:
        """The text of manifest.json: the same for the same contents."""
        return (
            json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        )


def artifact_id(files: Mapping[str, StoredFile]) -> str:
    """Digest of the names and digests of an artifact's files."""
    lines = (f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_path(artifact: Path) -> Path:
    """Where an artifact keeps its manifest."""
    return artifact / FOLDER / NAME


def is_artifact(path: Path) -> bool:
    """Whether a directory is a finished artifact of ours."""
    return manifest_path(path).is_file()


def read_manifest(artifact: Path) -> Manifest | None:
    """Return the manifest of an artifact, None for a directory that is not ours.

    Raises ArtifactError if the artifact is unfinished, or the manifest is not one that this version reads.
    """
    if not (artifact / FOLDER).exists():
        return None
    path = manifest_path(artifact)
    if not path.is_file():
        raise ArtifactError(f"{artifact} is unfinished: it has {FOLDER}/ but no {FOLDER}/{NAME}; press it again")
    if path.stat().st_size > _MAX_BYTES:
        raise ArtifactError(f"{path} has more than {_MAX_BYTES} bytes; it is not a manifest")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise ArtifactError(f"{path}: {where}: {first['msg']}; press the source again") from None
    if manifest.id != artifact_id(manifest.files):
        raise ArtifactError(f"{path}: id is not the digest of its files; press the source again")
    return manifest


def write_manifest(artifact: Path, manifest: Manifest) -> None:
    """Write or replace the manifest of an artifact, all or nothing."""
    path = manifest_path(artifact)
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest_file(path: Path) -> StoredFile:
    """Return the size and digest of a file, read once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return StoredFile(bytes=file.tell(), sha256=digest.hexdigest())
