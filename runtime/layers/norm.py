"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """y = x / sqrt(mean(x^2) + epsilon) * gain over the last dimension, in at least float32 inside."""

    gain: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = torch.nn.functional.rms_norm(x.to(wide), (x.size(-1),), None, self.epsilon)
        return self.gain * normed.to(x.dtype)

    def tensors(self) -> list[torch.Tensor]:
        return [self.gain]
