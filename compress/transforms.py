"""Which channels can be rescaled without changing what a layer computes, and doing it.

A layer has four such edges: a norm's gain and the group that reads it (twice), the rows of v and the columns of o, the
rows of up and the columns of down. A factor goes in on one side and out on the other.
"""

import torch
from torch import Tensor

from pressd.compress.block_work import BlockWork
from pressd.compress.group_plan import GroupPlan

NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
# The group whose inputs are made by a linear: that linear.
MAKERS = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}


def fold_into_norm(work: BlockWork, group: GroupPlan, scales: Tensor) -> None:
    """Multiply the columns of a group by scales [C] and divide the gain of the norm before it by them.

    The gain is stored in 16 bits: the scale that its rounding leaves is the one that the weights get, so nothing
    is lost. A gain of zero, or one that would become zero or infinite, stays as it is.
    """
    name = _layer(group) + f".{NORMS[group.group.kind]}.weight"
    gain = work.others[name]
    wide = gain.to(scales.device, torch.float32)
    folded = (wide / scales).to(gain.dtype).float()
    usable = (wide != 0) & (folded != 0) & torch.isfinite(folded)
    folded = torch.where(usable, folded, wide)
    exact = torch.where(usable, wide / folded, 1.0)
    work.others[name] = folded.to(gain.dtype).to(gain.device)
    work.replace(group, work.weight(group) * exact)
    work.divide_inputs(group, exact)


def fold_into_rows(work: BlockWork, group: GroupPlan, scales: Tensor, num_kv_heads: int, num_heads: int) -> None:
    """Multiply the columns of o or down by scales [C] and divide the rows that make them by the same.

    Heads that share values share their scales: they must be equal in `scales` already (see `shared_by_heads`).
    """
    prefix = f"{_layer(group)}.{MAKERS[group.group.kind]}"
    work.replace(group, work.weight(group) * scales)
    work.divide_inputs(group, scales)
    rows = scales
    if group.group.kind == "o":
        rows = scales.view(num_kv_heads, num_heads // num_kv_heads, -1)[:, 0].flatten()
    work.scale_rows(prefix, 1 / rows)


def shared_by_heads(scales: Tensor, num_kv_heads: int, num_heads: int) -> Tensor:
    """Return scales [num_heads * head_dim] with the same, geometric mean for the heads that share values."""
    heads = scales.view(num_kv_heads, num_heads // num_kv_heads, -1)
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(scales.shape)


def _layer(group: GroupPlan) -> str:
    """model.layers.<i> of a group called layers.<i>.<kind>."""
    return "model." + group.group.name.rpartition(".")[0]
