"""Round to nearest: every weight to the closest level of its own row or group, without looking at data."""

import torch
from torch import Tensor

from pressd.compress.rows import row_slices
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.integer_codes import quantize


def round_to_nearest(weight: Tensor, spec: Packed) -> tuple[Tensor, Tensor]:
    """Return codes (int8, or of an 8-bit float) [out, in] and scale [out, groups] of `weight` [out, in]."""
    if spec.storage == fp8.NAME:
        pieces = [fp8.quantize(weight[rows]) for rows in row_slices(weight)]
    else:
        pieces = [quantize(weight[rows], spec.bits, spec.group_size) for rows in row_slices(weight)]
    return torch.cat([codes for codes, _ in pieces]), torch.cat([scale for _, scale in pieces])
