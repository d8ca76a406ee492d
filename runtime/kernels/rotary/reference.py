"""Rotary position embedding in the halves layout of Hugging Face (Su et al. 2021), and what stands around it."""

import torch

from pressd.runtime.kernels.attention.kv_codes import encode, indexable
from pressd.runtime.kernels.norm.reference import norm


def rotate_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_gain: torch.Tensor | None,
    epsilon: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `RotateAndWrite` in kernels/registry.py says.

    Pools of 8 bits come with scales, as attention reads them: of one element for all, or float32 [blocks, block_size,
    kv_heads], which are written beside.
    """
    head_dim = keys.size(-1)
    if positions is not None:
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    query_key, own_values = heads.tensor_split([num_heads + num_kv_heads], dim=1)
    if norm_gain is not None:
        query_key = norm(query_key, norm_gain, epsilon)
    query, own_keys = rotate(query_key, cos, sin).tensor_split([num_heads], dim=1)
    if positions is not None:  # as where steps are padded: what no slot is for is left out
        kept = slots >= 0
        slots, own_keys, own_values = slots[kept], own_keys[kept], own_values[kept]
    write(keys, slots, own_keys, key_scales)
    write(values, slots, own_values, value_scales)
    return query


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] pairwise: element i with element i + head_dim / 2."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def write(blocks: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> None:
    """Store rows [T, kv_heads, head_dim] in blocks [blocks, block_size, kv_heads, head_dim] at slots int64 [T]."""
    if scales is None:
        stored = rows.to(blocks.dtype)
    else:
        stored, own = encode(rows, blocks.dtype, scales if scales.shape == (1,) else None)
        if own is not None:
            scales.flatten(0, 1).index_copy_(0, slots, own)
    indexable(blocks).flatten(0, 1).index_copy_(0, slots, indexable(stored))
