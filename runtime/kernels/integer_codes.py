"""Symmetric integers with one scale per row or per group of columns: the arithmetic int8 and packed_int share.

Rounding and clamping are compressed-tensors' (`calculate_qparams` and its `_quantize` kernel), so files of either tool
hold the same bits: the scale is max|w| / ((2^bits - 1) / 2) in the weight's own type, and a code is the nearest integer
to w / scale, computed in float32 or wider.
"""

import torch
from torch import Tensor


def scale_shape(out_features: int, in_features: int, group_size: int | None) -> tuple[int, int]:
    """Shape of a weight's scale: one column per group, or a single one without groups."""
    assert group_size is None or in_features % group_size == 0
    return out_features, 1 if group_size is None else in_features // group_size


def quantize(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to nearest: codes int8 [out, in] in [-2^(bits-1), 2^(bits-1)), scale [out, groups].

    The scale keeps the weight's type; it is NaN or infinite where the weight is. A group of zeros gets the type's
    epsilon for a scale, and codes of zero.
    """
    out_features, in_features = weight.shape
    groups = weight.reshape(*scale_shape(out_features, in_features, group_size), -1)
    largest = groups.abs().amax(dim=-1)
    scale = largest / torch.tensor((2**bits - 1) / 2, dtype=weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    wide = torch.promote_types(weight.dtype, torch.float32)
    codes = groups.to(wide) / scale.to(wide).unsqueeze(-1)
    codes = codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round_().to(torch.int8)
    return codes.reshape(out_features, in_features), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes x scale [out, in] in `dtype`, multiplied in the wider of `dtype` and the scale's type.

    An 8-bit code times a 16-bit float's significand fits in float32's, so float32 weights are exact.
    """
    wide = torch.promote_types(scale.dtype, dtype)
    groups = codes.reshape(*scale.shape, -1).to(wide)
    return groups.mul_(scale.to(wide).unsqueeze(-1)).reshape(codes.shape).to(dtype)
