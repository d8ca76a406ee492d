"""Rotary position embedding in the halves layout of Hugging Face (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from dataclasses import dataclass

import torch

from pressd.runtime.layers.rope_scaling import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Base of the geometric frequencies, how they are stretched, and what cosines and sines are multiplied by."""

    theta: float
    scaling: RopeScaling | None = None
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotations:
    """How the rows of a step are rotated: cosines and sines [T, 1, head_dim / 2], or tables and positions int64 [T]."""

    positions: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor


class Rotary:
    """Rotates queries and keys by their positions; cosines and sines are tabulated once, in float32 or wider."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if config.scaling is not None:
            frequencies = config.scaling.bend(frequencies, config.theta)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self.cos = (angles.cos() * config.magnitude).to(device, wide)
        self.sin = (angles.sin() * config.magnitude).to(device, wide)

    def of(self, positions: torch.Tensor, *, select: bool) -> Rotations:
        """Return the rotations of rows at positions int64 [T]; `select` takes them out of the tables."""
        if not select:
            return Rotations(positions=positions, cos=self.cos, sin=self.sin)
        return Rotations(positions=None, cos=self.cos[positions].unsqueeze(1), sin=self.sin[positions].unsqueeze(1))
