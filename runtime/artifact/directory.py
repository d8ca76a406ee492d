"""The files of a Hugging Face model directory: config.json, and the weight files with their checked headers."""

import os
from dataclasses import dataclass
from pathlib import Path

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.header import MAX_HEADER_BYTES, Header, TensorEntry, parse_object, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Buffers that older checkpoints store and every loader recomputes.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The weight files of a directory: checked headers by file name, and where each tensor is."""

    headers: dict[str, Header]
    entries: dict[str, TensorEntry]
    file_of: dict[str, str]


def read_config(path: Path) -> dict[str, object]:
    """Return config.json of a model directory; raises ArtifactError if there is no such directory or file."""
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is not a directory; give a model directory with config.json and .safetensors files"
        )
    if not (path / "config.json").is_file():
        raise ArtifactError(f"{path} has no config.json; give a Hugging Face model directory")
    return _read_json(path / "config.json")


def find_shards(path: Path) -> Shards:
    """Read the headers of model.safetensors, or of every file its index names.

    Raises ArtifactError for a missing file, a name outside the directory, and a tensor in two files or in none.
    """
    if (path / SINGLE).is_file():
        headers = {SINGLE: read_header(path / SINGLE)}
        return _gather(headers)
    if (path / INDEX).is_file():
        weight_map = _weight_map(path)
        headers = {name: read_header(path / name) for name in sorted(set(weight_map.values()))}
        shards = _gather(headers)
        for tensor, file in weight_map.items():
            if shards.file_of.get(tensor) != file and not tensor.endswith(_IGNORED_SUFFIX):
                raise ArtifactError(f"{INDEX}: tensor {tensor!r} is not in {file}")
        unlisted = sorted(shards.file_of.keys() - weight_map.keys())
        if unlisted:
            raise ArtifactError(f"{INDEX} does not list tensor {unlisted[0]!r} of {shards.file_of[unlisted[0]]}")
        return shards
    if any(path.glob("*.bin")):
        raise ArtifactError(f"{path} has only .bin weights (pickles, which are never read); save it as safetensors")
    raise ArtifactError(f"{path} has neither {SINGLE} nor {INDEX}")


def _gather(headers: dict[str, Header]) -> Shards:
    entries: dict[str, TensorEntry] = {}
    file_of: dict[str, str] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            if name.endswith(_IGNORED_SUFFIX):
                continue
            if name in entries:
                raise ArtifactError(f"tensor {name!r} is in both {file_of[name]} and {file}")
            entries[name] = entry
            file_of[name] = file
    return Shards(headers=headers, entries=entries, file_of=file_of)


def _weight_map(path: Path) -> dict[str, str]:
    raw = _read_json(path / INDEX).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise ArtifactError(f"{INDEX}: weight_map must be an object naming a file for each tensor")
    weight_map: dict[str, str] = {}
    for tensor, file in raw.items():
        if (
            not isinstance(file, str)
            or os.path.basename(file) != file
            or "\0" in file
            or not file.endswith(".safetensors")
        ):
            raise ArtifactError(
                f"{INDEX}: file {file!r} must be the plain name of a .safetensors file in this directory"
            )
        if not (path / file).is_file():
            raise ArtifactError(f"{path / file} is missing; {INDEX} names it")
        weight_map[tensor] = file
    return weight_map


def _read_json(path: Path) -> dict[str, object]:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path.name} has more than {MAX_HEADER_BYTES} bytes; it is not what its name says")
    return parse_object(path.read_bytes(), path.name)
