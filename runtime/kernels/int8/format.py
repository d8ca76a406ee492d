"""Int8 weights on disk: compressed-tensors' `int-quantized`, one signed byte per weight and one scale per row."""

import torch
from torch import Tensor

from pressd.runtime.kernels.integer_codes import dequantize, scale_shape

NAME = "int8"


def layout(
    out_features: int, in_features: int, bits: int, group_size: int | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `dtype` is the scale's."""
    return {
        "weight": (torch.int8, (out_features, in_features)),
        "weight_scale": (dtype, scale_shape(out_features, in_features, group_size)),
    }


def encode(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store for codes int8 [out, in] and scale [out, 1]."""
    return {"weight": codes, "weight_scale": scale}


def decode(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`."""
    return dequantize(tensors["weight"], tensors["weight_scale"], dtype)
