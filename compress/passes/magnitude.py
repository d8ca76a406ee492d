"""Pruning by magnitude: what is small is left out (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

import torch
from torch import Tensor


def keep_two_of_four(weight: Tensor) -> Tensor:
    """Return bool [out, in]: the two largest of every four columns of a row; between equals, the first stays."""
    groups = weight.abs().reshape(weight.size(0), -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, order[..., :2], True).view(weight.shape)
