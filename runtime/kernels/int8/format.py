"""Int8 weights on disk: compressed-tensors' `int-quantized`, one signed byte per weight and one scale per row."""

import torch
from torch import Tensor

from pressd.runtime.kernels.integer_codes import INPUT_SCALE, dequantize, scale_shape

NAME = "int8"


def layout(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    *,
    static_activations: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `dtype` is the scale's."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.int8, (out_features, in_features)),
        "weight_scale": (dtype, scale_shape(out_features, in_features, group_size)),
    }
    return tensors | {INPUT_SCALE: (dtype, (1,))} if static_activations else tensors


def encode(codes: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors to store for codes int8 [out, in], scale [out, 1] and, if static, activations' scale [1]."""
    tensors = {"weight": codes, "weight_scale": scale}
    return tensors if input_scale is None else tensors | {INPUT_SCALE: input_scale}


def decode(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`."""
    return dequantize(tensors["weight"], tensors["weight_scale"], dtype)
