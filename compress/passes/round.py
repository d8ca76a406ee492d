"""Rounding as something to be learnt: codes and scales move by the sign of a gradient through the whole layer.

SignRound (Cheng et al. 2024, https://arxiv.org/abs/2309.05516, section 3): every weight may lean towards the next level
up or down, every group may end its levels elsewhere, and steps of equal size, falling to nothing, need no tuning of
rates. Here both begin where another pass has ended.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pressd.compress.grid import Grid, code_range
from pressd.runtime.kernels.fp8 import format as fp8

# How far a code may be from where it began, and scales from theirs, as a part of them.
_MOST_LEAN, _MOST_STRETCH = 1.0, 0.5
# How much of the way from its code to its weight a latent begins: at half, it would be about to change.
_BEGIN = 0.9


class LatentWeight:
    """Rows [R, C] on a grid whose codes and scales can be moved a little: what is learnt of one fused group."""

    def __init__(self, weight: Tensor, grid: Grid, codes: Tensor) -> None:
        """Begin with `codes` [R, C], and lean each towards `weight` [R, C] without leaving its code."""
        self._grid = grid
        size = grid.group_size
        shape = (weight.size(0), grid.scale.size(1), size)
        steps = codes if grid.zero_point is None else codes - grid.zero_point.repeat_interleave(size, dim=1)
        wanted = weight / grid.scale.repeat_interleave(size, dim=1) - steps
        wanted = torch.where(wanted.abs() > 0.5, wanted.sign() * (1 - wanted.abs()).clamp_min(0), wanted)
        latent = (steps + 0.95 * wanted).view(shape)
        self._weight = latent * grid.scale.unsqueeze(-1)
        self.lean = torch.zeros(shape, device=weight.device, requires_grad=True)
        self.stretch = torch.zeros(grid.scale.shape, device=weight.device, requires_grad=True)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """What gradients are taken by."""
        return self.lean, self.stretch

    def value(self) -> Tensor:
        """Return the rounded weight [R, C]; its gradient is that of the weight before it was rounded."""
        scale = self._scale().unsqueeze(-1)
        latent = self._weight / scale + self.lean
        zero = 0.0 if self._grid.zero_point is None else self._grid.zero_point.unsqueeze(-1)
        low, high = code_range(self._grid.spec)
        codes = _through(torch.round, latent + zero).clamp(low, high)
        return ((codes - zero) * scale).flatten(1)

    @torch.no_grad()
    def rounded(self) -> tuple[Grid, Tensor]:
        """Return the grid, and codes [R, C], as they are now."""
        scale = self._scale()
        zero = 0.0 if self._grid.zero_point is None else self._grid.zero_point.unsqueeze(-1)
        low, high = code_range(self._grid.spec)
        codes = (self._weight / scale.unsqueeze(-1) + self.lean + zero).round().clamp(low, high)
        return self._grid.with_scale(scale), codes.flatten(1)

    @torch.no_grad()
    def keep_within_bounds(self) -> None:
        """Take back what went too far."""
        self.lean.clamp_(-_MOST_LEAN, _MOST_LEAN)
        self.stretch.clamp_(-_MOST_STRETCH, _MOST_STRETCH)

    def _scale(self) -> Tensor:
        """The scales as they would be stored."""
        return _through(lambda scale: scale.to(self._grid.dtype).float(), self._grid.scale * (1 + self.stretch))


def can_be_learnt(grid: Grid) -> bool:
    """Whether codes are whole numbers with scales of their own; floats and blocks of rows stay as they are."""
    return grid.spec.storage != fp8.NAME and grid.spec.block_size is None


def sign_descent(loss_of: Callable[[int], Tensor], weights: Sequence[LatentWeight], *, steps: int, rate: float) -> None:
    """Move the weights `steps` times against the sign of the gradient of `loss_of(step)`, by `rate` at first."""
    parameters = [parameter for weight in weights for parameter in weight.parameters]
    for step in range(steps):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(step), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient.sign(), alpha=rate * (1 - step / steps))
            for weight in weights:
                weight.keep_within_bounds()


def _through(rounding: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Round x and let gradients pass as if nothing had happened (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (rounding(x) - x).detach()
