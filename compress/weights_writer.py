"""Writes .safetensors files as a stream: headers first, for the plan knows every size, then each tensor at its place.

So memory holds one tensor at a time, however large a file is. Inside a file wide types come first, as safetensors
itself orders them: then every tensor lies at a multiple of its item size, and readers can map it.
"""

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from pressd.runtime.artifact.directory import INDEX, SINGLE

SHARD_BYTES = 5 << 30
_ALIGNMENT = 8
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class DamagedError(ValueError):
    """A file does not hold what an earlier run has written to it."""


class WeightsWriter:
    """The weight files of one directory, as a context manager: every planned tensor must be written once in it."""

    def __init__(self, directory: Path, units: list[list[PlannedTensor]], shard_bytes: int = SHARD_BYTES) -> None:
        """Plan the files for `units` of tensors in the order of writing; the tensors of a unit share a file.

        `file_bytes` is the size that each file will have. Nothing is written before the context is entered.
        """
        assert sys.byteorder == "little", "the file format is little-endian, and so must be what is written as it is"
        self._directory = directory
        self._shards = {file: _Shard(tensors) for file, tensors in _divide(units, shard_bytes).items()}
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard.places}
        self.file_bytes = {file: shard.num_bytes for file, shard in self._shards.items()}
        self._open: dict[str, BinaryIO] = {}
        self._is_named = True  # whether the names of all files are on disk

    def __enter__(self) -> "WeightsWriter":
        if len(self._shards) > 1:
            total = sum(tensor.num_bytes for shard in self._shards.values() for tensor, _ in shard.places.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._open.values():
            stream.close()
        missing = [name for shard in self._shards.values() for name in shard.places]
        assert error is not None or not missing, f"planned but never written: {missing}"

    def file_of(self, name: str) -> str:
        """Return the file that a planned tensor belongs to."""
        return self._file_of[name]

    def write(self, name: str, tensor: Tensor) -> bool:
        """Write one tensor; return whether that completed its file, which is then closed and on disk."""
        file = self._file_of[name]
        shard = self._shards[file]
        planned, offset = shard.places.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, planned.shape), name
        assert tensor.device.type == "cpu", name
        if file not in self._open:
            # One that is there already has other tensors in it: from before this run was taken up.
            is_there = (self._directory / file).is_file()
            self._open[file] = (self._directory / file).open("r+b" if is_there else "wb")
            self._open[file].write(shard.header)
            self._is_named = self._is_named and is_there
        stream = self._open[file]
        stream.seek(offset)
        stream.write(tensor_bytes(tensor))
        if shard.places:
            return False
        with self._open.pop(file):
            stream.flush()
            os.fsync(stream.fileno())
        return True

    def sync(self) -> None:
        """Wait until all that was written is on disk, under its name."""
        for stream in self._open.values():
            stream.flush()
            os.fsync(stream.fileno())
        if not self._is_named:
            _sync_directory(self._directory)
            self._is_named = True

    def take_over(self, name: str, sha256: str) -> Tensor:
        """Return a tensor that an earlier run has written, and count it as written.

        Raises DamagedError if the file holds something else by now.
        """
        path = self._directory / self._file_of[name]
        shard = self._shards[path.name]
        planned, offset = shard.places.pop(name)
        data = bytearray(planned.num_bytes)
        try:
            with path.open("rb") as stream:
                header = stream.read(len(shard.header))
                stream.seek(offset)
                num_bytes = stream.readinto(data)
        except FileNotFoundError:
            raise DamagedError(_damage(path, f"it is missing, and held {name}")) from None
        if header != shard.header:
            raise DamagedError(_damage(path, "its header is not what was written"))
        if num_bytes != len(data) or hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(_damage(path, f"{name} is not what was written"))
        if not data:
            return torch.empty(planned.shape, dtype=planned.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(planned.dtype).view(planned.shape)


def _damage(path: Path, what: str) -> str:
    return f"cannot resume: {path}: {what}; repair the file, or press without --resume"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as they are stored."""
    raw: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return raw


class _Shard:
    """One file: its header's bytes, and where each tensor that is still to come belongs."""

    def __init__(self, tensors: list[PlannedTensor]) -> None:
        ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in ordered:
            end = offset + tensor.num_bytes
            dtype = _DTYPE_NAMES[tensor.dtype]
            fields[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
            offset = end
        raw = json.dumps(fields, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        self.header = struct.pack("<Q", len(raw)) + raw
        self.places: dict[str, tuple[PlannedTensor, int]] = {}
        offset = len(self.header)
        for tensor in ordered:
            self.places[tensor.name] = (tensor, offset)
            offset += tensor.num_bytes
        self.num_bytes = offset


def _divide(units: list[list[PlannedTensor]], shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Fill files with whole units, in order, none over `shard_bytes` unless a single unit is."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for unit in units:
        num_bytes = sum(tensor.num_bytes for tensor in unit)
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += unit
        size += num_bytes
    return dict(zip(_file_names(len(shards)), shards, strict=True))


def _file_names(count: int) -> Iterator[str]:
    if count == 1:
        yield SINGLE
        return
    for number in range(1, count + 1):
        yield f"model-{number:05}-of-{count:05}.safetensors"
