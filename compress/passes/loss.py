"""What a change of a weight does to its outputs."""

import torch
from torch import Tensor


def output_error(lost: Tensor, gram: Tensor) -> float:
    """Return the mean over tokens of the outputs' squared change, summed over outputs: trace of D G D^T.

    D = `lost` [R, C] is the change of the weight, G = `gram` [C, C] the mean of x^T x over the inputs.
    """
    return float(((lost @ gram) * lost).sum(dtype=torch.float64).clamp_min(0))
