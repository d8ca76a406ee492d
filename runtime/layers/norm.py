"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """y = x / sqrt(mean(x^2) + epsilon) * gain over the last dimension, in at least float32 inside."""

    gain: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Not torch's rms_norm, which is composed of slower parts on a CPU: 70 us for 16 rows of 2,048, and this 31.
        length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.size(-1)).add_(self.epsilon).rsqrt_()
        return self.gain * (wide * scale).to(x.dtype)

    def tensors(self) -> list[torch.Tensor]:
        return [self.gain]
