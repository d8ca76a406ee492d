"""Writes through to the weight files, and re-opens each finished one: what was written last is compared with memory.

That catches what no type can: an offset or an order of bytes that a reader sees otherwise, and a disk that lies.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pressd.compress.weights_writer import WeightsWriter


class Reread:
    """Hands tensors to a writer and keeps, per unfinished file, those of the linear (or other tensor) written last."""

    def __init__(self, directory: Path, writer: WeightsWriter) -> None:
        self._directory = directory
        self._writer = writer
        self._last: dict[str, dict[str, Tensor]] = {}

    def write(self, tensors: dict[str, Tensor], *, pressed: bool = False) -> None:
        """Write tensors that share a file; check that file once it is complete.

        `pressed` ones are kept before others: their several tensors of several types say more of a file.
        """
        file = self._writer.file_of(next(iter(tensors)))
        if pressed or len(self._last.get(file, ())) <= 1:
            self._last[file] = tensors
        for name, tensor in tensors.items():
            if self._writer.write(name, tensor):
                _check(self._directory / file, self._last.pop(file))


def _check(path: Path, written: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name, tensor in written.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise OSError(f"{path}: {name} reads back otherwise than it was written; check the disk")
