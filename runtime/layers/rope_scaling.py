"""Ways to stretch rotary frequencies to contexts beyond the trained one."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def bend(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """Return the stretched frequencies [head_dim / 2]."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept: Llama 3.1's, as transformers' "llama3"."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def bend(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """Return the stretched frequencies [head_dim / 2]."""
        wavelengths = 2 * math.pi / frequencies
        # 1 keeps a frequency (many turns within the trained context), 0 divides it, in between interpolates.
        turns = self.original_max_position / wavelengths
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(keep.clamp(0, 1), frequencies, self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Frequencies divided by `factor` unless they turn often (Peng et al. 2023, https://arxiv.org/abs/2309.00071).

    Dimensions that turn `beta_fast` times or more within the trained context are kept, those of `beta_slow` turns or
    fewer divided, in between a ramp; `truncate` widens the ramp to whole dimensions. Queries and keys then grow by
    `yarn_magnitude`.
    """

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    truncate: bool

    def bend(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """Return the stretched frequencies [head_dim / 2]."""
        num_pairs = frequencies.numel()
        first, last = (self._pair_turning(turns, theta, num_pairs) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper bound is transformers', in elements of a head and not in pairs.
        first, last = max(first, 0), min(last, 2 * num_pairs - 1)
        width = last - first or 0.001
        ramp = (torch.arange(num_pairs, dtype=torch.float32) - first) / width
        return _blend(1 - ramp.clamp(0, 1), frequencies, self.factor)

    def _pair_turning(self, turns: float, theta: float, num_pairs: int) -> float:
        """Which pair, as a fraction, makes so many turns within the trained context."""
        wavelength = self.original_max_position / turns
        return num_pairs * math.log(wavelength / (2 * math.pi)) / math.log(theta)


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


def yarn_magnitude(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """Return what YaRN recommends to multiply cosines and sines by; with two scales (DeepSeek's), a quotient."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0

    return growth(mscale) / growth(mscale_all_dim)


def _blend(keep: torch.Tensor, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    return keep * frequencies + (1 - keep) * frequencies / factor
