"""Moves size between a channel of inputs and the weights that read it: the function stays, rounding gets easier.

Inputs x [T, C] are divided by s [C] where they are made (in a norm's gain, or in the rows of the linear before), and
the columns of the weights that read them are multiplied by s.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pressd.compress.passes.loss import output_error

_SMALLEST = 1e-5


def smooth_scales(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return s [C] = max|x|^alpha / max|w|^(1 - alpha), of inputs' largest [C] and weight [R, C].

    SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438, equation 4): alpha says how much of the difficulty
    goes from activations into weights. A channel without inputs or without weights is left as it is.
    """
    columns = weight.abs().amax(0)
    scales = largest.clamp_min(_SMALLEST).pow(alpha) / columns.clamp_min(_SMALLEST).pow(1 - alpha)
    return torch.where((largest > 0) & (columns > 0), scales, 1.0).clamp_min(_SMALLEST)


def search_scales(
    mean: Tensor, gram: Tensor, weight: Tensor, nearest: Callable[[Tensor], Tensor], *, steps: int
) -> tuple[Tensor, float, float]:
    """Return s [C] = mean|x|^a, for that a of `steps` parts of 0..1 which loses least; the loss without and with it.

    AWQ (Lin et al. 2024, https://arxiv.org/abs/2306.00978, section 3.2): few channels matter far more than others, by
    the size of their inputs `mean` [C]. `nearest` rounds a weight [R, C] as it will be stored. The loss is the mean
    squared change of the outputs, known from the inputs' gram [C, C] alone. s = 1 is always among the choices.
    """
    best = torch.ones_like(mean)
    least = without = output_error(nearest(weight) - weight, gram)
    for step in range(1, steps + 1):
        scales = mean.clamp_min(_SMALLEST).pow(step / steps)
        scales = (scales / (scales.max() * scales.min()).sqrt()).clamp_min(_SMALLEST)
        scales = torch.where(mean > 0, scales, 1.0)
        loss = output_error(nearest(weight * scales) / scales - weight, gram)
        if loss < least:
            best, least = scales, loss
    return best, without, least
