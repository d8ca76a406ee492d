"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from dataclasses import dataclass

import torch

from pressd.runtime.kernels.registry import CodeType, PointwiseKernels, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """y = x / sqrt(mean(x^2) + epsilon) * gain over the last dimension, in at least float32 inside."""

    gain: torch.Tensor
    epsilon: float
    kernels: PointwiseKernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        _, y = self.add(x, None)
        assert isinstance(y, torch.Tensor)
        return y

    def add(
        self, x: torch.Tensor, delta: torch.Tensor | None, quantize: CodeType | None = None
    ) -> tuple[torch.Tensor, Rows]:
        """Return x + delta (x without one) and its norm, both [T, H]; the norm as codes, if their type is given."""
        return self.kernels.add_norm(x, delta, self.gain, self.epsilon, quantize)

    def tensors(self) -> list[torch.Tensor]:
        return [self.gain]
