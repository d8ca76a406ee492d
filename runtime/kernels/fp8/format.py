"""Eight-bit floats on disk: compressed-tensors' `float-quantized`, e4m3 without infinities.

There is one scale per row, or one per block of `block_size` rows and columns; the last block of rows may be lower.
"""

import torch
from torch import Tensor

from pressd.runtime.kernels.integer_codes import INPUT_SCALE

NAME = "fp8"
CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max  # 448


def layout(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    *,
    block_size: int | None = None,
    static_activations: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `dtype` is the scale's."""
    assert group_size is None
    scale = (out_features, 1)
    if block_size is not None:
        scale = -(-out_features // block_size), -(-in_features // block_size)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (CODES, (out_features, in_features)),
        "weight_scale": (dtype, scale),
    }
    return tensors | {INPUT_SCALE: (dtype, (1,))} if static_activations else tensors


def encode(codes: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors to store for codes e4m3 [out, in], scale and, if static, activations' scale [1]."""
    tensors = {"weight": codes, "weight_scale": scale}
    return tensors if input_scale is None else tensors | {INPUT_SCALE: input_scale}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to nearest: codes e4m3 [out, in] and scale [out, 1] in the weight's type.

    The scale is max|w| / 448, as in compressed-tensors; of a row of zeros the type's epsilon.
    """
    scale = _scale(weight.abs().amax(dim=-1, keepdim=True))
    return _codes(weight, scale), scale


def quantize_blocks(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `quantize`, with one scale for each block: scale [ceil(out / block_size), in / block_size]."""
    out_features, in_features = weight.shape
    largest = weight.abs().view(out_features, -1, block_size).amax(dim=-1)
    padded = torch.nn.functional.pad(largest, (0, 0, 0, -out_features % block_size))
    scale = _scale(padded.view(-1, block_size, in_features // block_size).amax(dim=1))
    groups = weight.view(out_features, -1, block_size)
    by_row = of_rows(scale, torch.arange(out_features, device=weight.device), block_size)
    return _codes(groups, by_row.unsqueeze(-1)).view(weight.shape), scale


def of_rows(scale: Tensor, rows: Tensor, block_size: int | None) -> Tensor:
    """Return the scales of some rows, by their numbers int64 [N]: one or one for each block of columns, [N, groups]."""
    return scale[rows if block_size is None else rows // block_size]


def decode(tensors: dict[str, Tensor], dtype: torch.dtype, block_size: int | None = None) -> Tensor:
    """Return the weight [out, in] in `dtype`, multiplied in the wider of `dtype`, the scale's type and float32."""
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if block_size is not None:
        scale = of_rows(scale, torch.arange(len(codes), device=codes.device), block_size)
    return dequantize(codes, scale, dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes e4m3 [N, in] x scale [N, groups] in `dtype`, multiplied as `decode` does it."""
    wide = torch.promote_types(torch.promote_types(scale.dtype, dtype), torch.float32)
    groups = codes.to(wide).view(*scale.shape, codes.size(1) // scale.size(1))
    return groups.mul_(scale.to(wide).unsqueeze(-1)).view(codes.shape).to(dtype)


def _scale(largest: Tensor) -> Tensor:
    scale = largest / torch.tensor(LARGEST, dtype=largest.dtype)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) / scale.to(wide)).clamp(-LARGEST, LARGEST).to(CODES)
