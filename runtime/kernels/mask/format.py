"""Two of every four weights of a row, and which: one bit per column, the first column in the lowest bit.

The kept values form a matrix of half the width that any other format may store.
"""

import torch
from torch import Tensor

NAME = "mask"


def layout(out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of the mask by its suffix."""
    return {"mask": (torch.uint8, (out_features, -(-in_features // 8)))}


def compact(weight: Tensor, kept: Tensor) -> Tensor:
    """Return the kept values [out, in / 2] of `weight` [out, in], for `kept` bool [out, in], two true in every four."""
    return weight[kept].view(weight.size(0), weight.size(1) // 2)


def expand(values: Tensor, kept: Tensor) -> Tensor:
    """Return the weight [out, in] with `values` [out, in / 2] where `kept` is true and zeros elsewhere."""
    weight = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return weight.masked_scatter_(kept, values)


def pack(kept: Tensor) -> Tensor:
    """Return bits uint8 [out, ceil(in / 8)] of bool [out, in]."""
    out_features, in_features = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -in_features % 8)).view(out_features, -1, 8)
    weights = (1 << torch.arange(8, device=kept.device)).to(torch.uint8)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, in_features: int) -> Tensor:
    """Return bool [out, in] of bits uint8 [out, ceil(in / 8)]."""
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> positions) & 1).flatten(1)[:, :in_features].bool()


def is_two_of_four(bits: Tensor, in_features: int) -> bool:
    """Whether a mask from a file keeps exactly two of every four columns, as the reader of `values` relies on."""
    kept = unpack(bits, in_features).view(bits.size(0), -1, 4).sum(-1)
    spare = torch.nn.functional.pad(unpack(bits, 8 * bits.size(1)), (-in_features, 0))
    return bool((kept == 2).all()) and not bool(spare.any())
