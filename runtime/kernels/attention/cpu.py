"""Attention through PyTorch's fused CPU kernel, one call per sequence on views of the block pool."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, causal_mask, sequence_view
from pressd.runtime.kernels.registry import AttentionKernel, Device


def run(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    batch: AttentionBatch,
    problem: AttentionProblem,
) -> torch.Tensor:
    output = torch.empty_like(query)
    for part in batch.runs:
        rows = slice(part.start, part.start + part.length)
        first = part.first_visible(problem.window)
        keys = sequence_view(key_blocks, part, first).transpose(0, 1).unsqueeze(0)
        values = sequence_view(value_blocks, part, first).transpose(0, 1).unsqueeze(0)
        if part.length == 1:
            output[rows] = _one_token(query[rows], keys, values, problem)
            continue
        whole = part.length == part.kv_length and (problem.window is None or part.length <= problem.window)
        output[rows] = scaled_dot_product_attention(
            query[rows].transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=None if whole else causal_mask(part, problem.window, query.device, first),
            is_causal=whole,
            enable_gqa=problem.num_heads != problem.num_kv_heads,
            scale=problem.scale,
        )[0].transpose(0, 1)
    return output


def _one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, problem: AttentionProblem
) -> torch.Tensor:
    """Decode one token: the heads that share keys become the query rows, so nothing is expanded or masked."""
    group = problem.num_heads // problem.num_kv_heads
    packed = query.view(1, problem.num_kv_heads, group, problem.head_dim)
    out = scaled_dot_product_attention(packed, keys, values, scale=problem.scale)
    return out.reshape(1, problem.num_heads, problem.head_dim)


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"PyTorch has no fused kernel for {problem.dtype}"
    return None


KERNEL = AttentionKernel(name="cpu", why_not=why_not, run=run)
