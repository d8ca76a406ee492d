"""Writes through to the weight files, and re-opens each finished one: one linear per file is decoded against memory.

That catches what no type can: a packing, an offset or an order of bytes that a reader sees otherwise.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pressd.compress.encoding import decode
from pressd.compress.weights_writer import WeightsWriter
from pressd.runtime.artifact.schemes import LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Witness:
    """The tensors of one linear, or one other tensor, as they were handed to the writer."""

    tensors: dict[str, Tensor]
    prefix: str
    spec: LinearSpec | None

    @property
    def is_pressed(self) -> bool:
        return self.spec is not None and self.spec.storage != "dense"


class Reread:
    """Hands tensors to a writer and keeps, per unfinished file, the last pressed linear (else the last tensor)."""

    def __init__(self, directory: Path, writer: WeightsWriter) -> None:
        self._directory = directory
        self._writer = writer
        self._witnesses: dict[str, _Witness] = {}

    def write(self, tensors: dict[str, Tensor], prefix: str = "", spec: LinearSpec | None = None) -> None:
        """Write tensors that share a file; check that file once it is complete."""
        file = self._writer.file_of(next(iter(tensors)))
        witness = _Witness(tensors=tensors, prefix=prefix, spec=spec)
        kept = self._witnesses.get(file)
        if kept is None or witness.is_pressed or not kept.is_pressed:
            self._witnesses[file] = witness
        for name, tensor in tensors.items():
            if self._writer.write(name, tensor):
                _check(self._directory / file, self._witnesses.pop(file))


def _check(path: Path, witness: _Witness) -> None:
    with safe_open(path, framework="pt", device="cpu") as file:
        read = {name: file.get_tensor(name) for name in witness.tensors}
        if not torch.equal(_meaning(read, witness), _meaning(witness.tensors, witness)):
            name = next(iter(witness.tensors))
            raise OSError(f"{path}: {name} reads back otherwise than it was written; check the disk")


def _meaning(tensors: dict[str, Tensor], witness: _Witness) -> Tensor:
    """The weight that stored tensors stand for."""
    if witness.spec is None or not witness.is_pressed:
        return next(iter(tensors.values()))
    by_suffix = {name.removeprefix(f"{witness.prefix}."): tensor for name, tensor in tensors.items()}
    return decode(by_suffix, witness.spec, torch.float32)
