"""Eight-bit floats on disk: compressed-tensors' `float-quantized`, e4m3 without infinities, one scale per row."""

import torch
from torch import Tensor

NAME = "fp8"
CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max  # 448


def layout(
    out_features: int, in_features: int, bits: int, group_size: int | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `dtype` is the scale's."""
    assert group_size is None
    return {"weight": (CODES, (out_features, in_features)), "weight_scale": (dtype, (out_features, 1))}


def encode(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store for codes e4m3 [out, in] and scale [out, 1]."""
    return {"weight": codes, "weight_scale": scale}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to nearest: codes e4m3 [out, in] and scale [out, 1] in the weight's type.

    The scale is max|w| / 448, as in compressed-tensors; of a row of zeros the type's epsilon.
    """
    largest = weight.abs().amax(dim=-1, keepdim=True)
    scale = largest / torch.tensor(LARGEST, dtype=weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    wide = torch.promote_types(weight.dtype, torch.float32)
    codes = (weight.to(wide) / scale.to(wide)).clamp(-LARGEST, LARGEST).to(CODES)
    return codes, scale


def decode(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`, multiplied in the wider of `dtype`, the scale's type and float32."""
    codes, scale = tensors["weight"], tensors["weight_scale"]
    wide = torch.promote_types(torch.promote_types(scale.dtype, dtype), torch.float32)
    return (codes.to(wide) * scale.to(wide)).to(dtype)
