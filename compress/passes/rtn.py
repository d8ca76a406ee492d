"""Round to nearest: every weight to the closest level of its own row, group or block, without looking at data."""

import torch
from torch import Tensor

from pressd.compress.encoding import Codes
from pressd.compress.rows import row_slices
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.integer_codes import quantize, quantize_with_zero_points


def round_to_nearest(weight: Tensor, spec: Packed) -> Codes:
    """Return `weight` [out, in] rounded as `spec` stores it."""
    pieces = [_round(weight[rows], spec) for rows in row_slices(weight, multiple=spec.block_size or 1)]
    zero_points = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    return Codes(
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )


def _round(weight: Tensor, spec: Packed) -> Codes:
    if spec.storage == fp8.NAME:
        codes, scale = fp8.quantize(weight) if spec.block_size is None else fp8.quantize_blocks(weight, spec.block_size)
        return Codes(codes=codes, scale=scale)
    if spec.symmetric:
        codes, scale = quantize(weight, spec.bits, spec.group_size)
        return Codes(codes=codes, scale=scale)
    codes, scale, zero_point = quantize_with_zero_points(weight, spec.bits, spec.group_size)
    return Codes(codes=codes, scale=scale, zero_point=zero_point)
