"""Rounding as something to be learnt: codes and scales move by the sign of a gradient through the whole layer.

SignRound (Cheng et al. 2024, https://arxiv.org/abs/2309.05516, section 3): every weight may lean towards the next level
up or down, every scale may stretch, and steps of equal size, falling to nothing, need no tuning of rates. The gradient
is averaged over some steps before its sign is taken, which on the example model saves half of the steps.

What GPTQ has rounded is not moved to other codes: these are balanced against each other, and every way of flipping many
of them at once, with steps of any size, made layers worse. Their scales are stretched all the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pressd.compress.grid import Grid, code_range
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8

# How far a code may be from where it began, and scales from theirs, as a part of them.
_MOST_LEAN, _MOST_STRETCH = 1.0, 0.5
# How much of the way from its code to its weight a latent begins: at all of it, many would be about to change.
_BEGIN = 0.95
# Scales move slower than codes lean: each moves a whole group.
_STRETCH_RATE = 0.3
_MOMENTUM = 0.9


class LatentWeight:
    """Rows [R, C] on a grid whose codes and scales can be moved a little: what is learnt of one fused group."""

    def __init__(self, weight: Tensor, grid: Grid, codes: Tensor, *, leans: bool) -> None:
        """Begin with `codes` [R, C], each leaning towards `weight` [R, C]; without `leans` they stay what they are."""
        self._grid = grid
        size = grid.group_size
        shape = (weight.size(0), grid.scale.size(1), size)
        steps = codes if grid.zero_point is None else codes - grid.zero_point.repeat_interleave(size, dim=1)
        wanted = weight / grid.scale.repeat_interleave(size, dim=1) - steps
        # A code further away than the nearest stays where it was put, the nearer to a change the nearer it is.
        wanted = torch.where(wanted.abs() > 0.5, wanted.sign() * (1 - wanted.abs()).clamp_min(0), wanted)
        self._latent = (steps + _BEGIN * wanted).view(shape)
        self.lean = torch.zeros(shape, device=weight.device, requires_grad=leans)
        self.stretch = torch.zeros(grid.scale.shape, device=weight.device, requires_grad=True)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What gradients are taken by."""
        moving = {"lean": self.lean, "stretch": self.stretch}
        return {name: parameter for name, parameter in moving.items() if parameter.requires_grad}

    def value(self) -> Tensor:
        """Return the rounded weight [R, C]; its gradient is that of the weight before it was rounded."""
        zero = self._zero_point()
        low, high = code_range(self._grid.spec)
        codes = _through(torch.round, self._latent + self.lean + zero).clamp(low, high)
        return ((codes - zero) * self._scale().unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def rounded(self) -> tuple[Grid, Tensor]:
        """Return the grid, and codes [R, C], as they are now."""
        low, high = code_range(self._grid.spec)
        codes = (self._latent + self.lean + self._zero_point()).round().clamp(low, high)
        return self._grid.with_scale(self._scale()), codes.flatten(1)

    @torch.no_grad()
    def keep_within_bounds(self) -> None:
        """Take back what went too far."""
        self.lean.clamp_(-_MOST_LEAN, _MOST_LEAN)
        self.stretch.clamp_(-_MOST_STRETCH, _MOST_STRETCH)

    def _zero_point(self) -> Tensor:
        zero = self._grid.zero_point
        return self._grid.scale.new_zeros(1, 1, 1) if zero is None else zero.unsqueeze(-1)

    def _scale(self) -> Tensor:
        """The scales as they would be stored."""
        return _through(lambda scale: scale.to(self._grid.dtype).float(), self._grid.scale * (1 + self.stretch))


def can_be_learnt(spec: Packed) -> bool:
    """Whether codes are whole numbers with scales of their own; floats and blocks of rows stay as they are."""
    return spec.storage != fp8.NAME and spec.block_size is None


def sign_descent(loss_of: Callable[[int], Tensor], weights: Sequence[LatentWeight], *, steps: int, rate: float) -> None:
    """Move the weights `steps` times against the sign of the averaged gradient of `loss_of(step)`, by `rate` at first.

    Scales move by a part of that.
    """
    moving = [(name, one) for weight in weights for name, one in weight.parameters.items()]
    averages = [torch.zeros_like(one) for _, one in moving]
    for step in range(steps):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(step), [one for _, one in moving])
        with torch.no_grad():
            now = rate * (1 - step / steps)
            for (name, one), average, gradient in zip(moving, averages, gradients, strict=True):
                average.lerp_(gradient, 1 - _MOMENTUM)
                one.sub_(average.sign(), alpha=now if name == "lean" else now * _STRETCH_RATE)
            for weight in weights:
                weight.keep_within_bounds()


def _through(rounding: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Round x and let gradients pass as if nothing had happened (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (rounding(x) - x).detach()
