"""Rotary position embedding in the halves layout of Hugging Face (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of low frequencies to contexts beyond the trained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Base of the geometric frequencies; `linear_factor` divides positions, `llama3` bends frequencies."""

    theta: float
    linear_factor: float = 1.0
    llama3: RopeScaling | None = None


class Rotary:
    """Rotates queries and keys by their positions; cosines and sines are tabulated once, in float32 or wider."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        frequencies = _frequencies(config, head_dim)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies / config.linear_factor
        self.cos = angles.cos().to(device, wide)
        self.sin = angles.sin().to(device, wide)

    def select(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), each [T, 1, head_dim / 2], of positions int64 [T]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] pairwise: element i with element i + head_dim / 2."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = config.llama3
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 keeps a frequency (many turns within the trained context), 0 divides it by the factor, in between interpolates.
    turns = scaling.original_max_position / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
