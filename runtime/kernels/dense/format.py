"""Dense weights on disk: the Hugging Face layout, one floating-point tensor per linear."""

import torch
from torch import Tensor

NAME = "dense"


def layout(
    out_features: int, in_features: int, bits: int, group_size: int | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `bits` and `group_size` say nothing here."""
    return {"weight": (dtype, (out_features, in_features))}


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store for `weight` [out, in]."""
    return {"weight": weight}


def decode(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`."""
    return tensors["weight"].to(dtype)
