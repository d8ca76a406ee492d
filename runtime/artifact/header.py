"""The header of a .safetensors file, checked before any library maps the file.

Layout: 8 bytes little-endian length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors'
bytes without gaps (huggingface/safetensors, README "Format").
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from pressd.runtime.artifact.errors import ArtifactError

# Far above any real header (a shard of a thousand-expert model has 20,000 names of 100 bytes), far below a nuisance.
MAX_HEADER_BYTES = 32 << 20
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: `dtype` in the format's words, `start` and `end` in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Every tensor of one file, in file order, and the digest of the header's own bytes."""

    entries: dict[str, TensorEntry]
    sha256: str


def read_header(path: Path) -> Header:
    """Read and check the header of `path`; raises ArtifactError with one line that says what is wrong."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ArtifactError(f"{path.name} has {size} bytes; a .safetensors file has at least 8; copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ArtifactError(
                f"{path.name} announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        if length > size - 8:
            raise ArtifactError(f"{path.name} announces a header of {length} bytes but has {size}; it is truncated")
        raw = file.read(length)
    fields = parse_object(raw, path.name)
    fields.pop("__metadata__", None)
    entries = {name: _entry(path.name, name, value, 8 + length) for name, value in fields.items()}
    _check_extents(path.name, entries, 8 + length, size)
    return Header(entries=entries, sha256=hashlib.sha256(raw).hexdigest())


def parse_object(raw: bytes, name: str) -> dict[str, object]:
    """Parse JSON from an untrusted file called `name` that must be an object without repeated keys."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except RecursionError:
        raise ArtifactError(f"{name}: JSON is nested too deeply") from None
    except ValueError as error:
        raise ArtifactError(f"{name}: JSON is not valid ({error})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{name}: JSON is a {type(value).__name__} where an object is needed")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {key!r} appears twice")
        fields[key] = value
    return fields


def _entry(file: str, name: str, value: object, data_start: int) -> TensorEntry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ArtifactError(f"{where} has dtype {dtype!r}, which is not known")
    if not _are_sizes(shape) or len(shape) > 8:
        raise ArtifactError(f"{where} has a shape that is not a short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{where} has data_offsets that are not a pair [start, end]")
    start, end = offsets
    if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise ArtifactError(f"{where} is {dtype} {list(shape)} but takes {end - start} bytes")
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end)


def _are_sizes(value: object) -> bool:
    """Whether `value` is a list of integers that fit a file offset (a bool is no integer here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_extents(file: str, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors must cover the rest of the file once: no gap, no overlap, nothing past its end."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise ArtifactError(f"{file}: tensor {name!r} {what} (starts at byte {entry.start}, not {position})")
        position = entry.end
    if position > size:
        raise ArtifactError(f"{file} has {size} bytes but its tensors need {position}; it is truncated")
    if position < size:
        raise ArtifactError(f"{file} has {size - position} bytes after its last tensor; it is not what was written")
