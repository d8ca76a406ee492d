"""Memory that every step uses again, and the way of small lists to the device."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch


class Scratch:
    """Buffers by name, grown as needed and never given back: a fresh page costs more than the arithmetic on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._ids = torch.zeros(0)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the buffer of that name; its old content, and older views of it, are lost."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer.narrow(0, 0, size).view(shape)

    def ids(self, vocab_size: int) -> torch.Tensor:
        """Return 0, 1, 2, ... as float32 [V], in which they are exact below 2^24: comparing floats is fast."""
        assert vocab_size <= 1 << 24
        if self._ids.shape[0] != vocab_size:
            self._ids = torch.arange(vocab_size, dtype=torch.float32, device=self.device)
        return self._ids

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums of rows of [B, V] in float64: their rounding, which depends on the order, is below 1e-15."""
        return self.take("wide", values.shape, torch.float64).copy_(values).sum(dim=-1)


Values: TypeAlias = Sequence[int] | Sequence[float] | Sequence[tuple[int, ...]]


def upload(values: Values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the values as a tensor on `device`; a GPU is not waited for.

    It reads them when it comes to it: from pinned memory, which is kept until then, as other memory is not.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
