"""Integers with one scale per row or per group of columns: the arithmetic int8 and packed_int share.

Rounding and clamping are compressed-tensors' (`calculate_qparams` and its `_quantize` kernel), so files of either tool
hold the same bits: the scale is max|w| / ((2^bits - 1) / 2) in the weight's own type, and a code is the nearest integer
to w / scale, computed in float32 or wider. With zero points it is (max - min) / (2^bits - 1), of a range that has 0.
"""

import torch
from torch import Tensor

HALF_RANGE_8 = 127.5  # the symmetric 8-bit range is 255 steps wide
INPUT_SCALE = "input_scale"  # the suffix of a stored scale of activations, int8 or e4m3


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


def quantize_with_zero_points(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` [out, in] between its extremes: codes int8 [out, in], scale and zero point [out, groups].

    w = (code - zero point) x scale; zero points are int8 in the range of the codes, so that 0 has one. The scale keeps
    the weight's type. A group of zeros gets the type's epsilon for a scale, and codes and a zero point of zero.
    """
    out_features, in_features = weight.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.reshape(*scale_shape(out_features, in_features, group_size), -1)
    least, most = groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)
    scale = (most - least) / torch.tensor(2**bits - 1, dtype=weight.dtype)
    is_zero = scale == 0
    zero_point = (low - least / scale).clamp_(low, high).round_().masked_fill_(is_zero, 0).to(torch.int8)
    scale = torch.where(is_zero, torch.finfo(scale.dtype).eps, scale)
    wide = torch.promote_types(weight.dtype, torch.float32)
    codes = groups.to(wide) / scale.to(wide).unsqueeze(-1)
    codes = codes.add_(zero_point.unsqueeze(-1)).clamp_(low, high).round_().to(torch.int8)
    return codes.reshape(out_features, in_features), scale, zero_point


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """Return (codes - zero_point) x scale [out, in] in `dtype`, multiplied in the wider of it and the scale's type.

    `zero_point` int8 [out, groups], None for zeros. A difference of 8-bit numbers is exact in every type. Times a
    16-bit float's significand it fits in float32's, so float32 weights are exact.
    """
    wide = torch.promote_types(scale.dtype, dtype)
    groups = codes.reshape(*scale.shape, codes.size(-1) // scale.size(-1)).to(wide)
    if zero_point is not None:
        groups.sub_(zero_point.unsqueeze(-1))
    return groups.mul_(scale.to(wide).unsqueeze(-1)).reshape(codes.shape).to(dtype)


def quantize_activations(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Round x [T, in] to int8 by the largest value of each row, or of each group of columns of a row.

    Returns codes (whole numbers in -127..127 as float) [T, in] and scale [T, groups], in float32 or wider. Zeros get
    codes of zero. Dynamic symmetric quantisation as compressed-tensors does it, but for two things: the scale does not
    round to x's own type, and no code is -128. The largest value lies half way between two codes, by the definition of
    the scale: with both -127 and -128 to choose from, the last bit of a sum would decide, and with it how a prompt was
    cut into chunks.
    """
    num_rows, in_features = x.shape
    groups = x.reshape(*scale_shape(num_rows, in_features, group_size), group_size or in_features)
    codes = groups.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    # Not abs().amax(): a second array of this size costs more than a second pass.
    largest = torch.maximum(codes.amax(dim=-1, keepdim=True), codes.amin(dim=-1, keepdim=True).neg_())
    scale = largest.div_(HALF_RANGE_8).clamp_min_(torch.finfo(codes.dtype).tiny)
    codes.div_(scale).round_().clamp_(-127, 127)
    return codes.view(num_rows, in_features), scale.squeeze(-1)


def quantize_activations_by(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [T, in] to int8 by the scale [1] that is stored for all of x, and clamp what is beyond -128..127.

    Returns as `quantize_activations` does codes (as float) and scale [T, 1], which is NaN where a row of x has NaN:
    codes lose it once they are integers. Static symmetric quantisation as compressed-tensors does it.
    """
    codes = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    scale = input_scale.to(codes.dtype)
    codes.div_(scale).round_().clamp_(-128, 127)
    return codes, codes.amax(dim=-1, keepdim=True).mul_(0).add_(scale)


def round_activations(x: Tensor, group_size: int | None) -> Tensor:
    """Return codes x scale of `quantize_activations`, [T, in] in x's type: what int8 leaves of x.

    The product of an 8-bit code and a scale rounds once, to the type that the layer computes in anyway.
    """
    codes, scale = quantize_activations(x, group_size)
    return dequantize(codes, scale, x.dtype)
