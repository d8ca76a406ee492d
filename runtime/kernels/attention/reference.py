"""Attention written out: one sequence at a time, softmax in at least float32."""

import torch

from pressd.runtime.kernels.attention.batch import (
    AttentionBatch,
    AttentionProblem,
    causal_mask,
    paged_runs,
)
from pressd.runtime.kernels.attention.kv_codes import sequence_numbers
from pressd.runtime.kernels.registry import REFERENCE, AttentionKernel, Device


def run(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    batch: AttentionBatch,
    problem: AttentionProblem,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = torch.promote_types(problem.dtype, torch.float32)
    group = problem.num_heads // problem.num_kv_heads
    output = torch.empty_like(query)
    for part in batch.runs or paged_runs(batch, key_blocks.size(1)):
        rows = slice(part.start, part.start + part.length)
        first = part.first_visible(problem.window)
        keys = sequence_numbers(key_blocks, key_scales, part, first, wide).repeat_interleave(group, dim=1)
        values = sequence_numbers(value_blocks, value_scales, part, first, wide).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[rows].to(wide), keys) * problem.scale
        scores = scores.masked_fill(~causal_mask(part, problem.window, query.device, first), float("-inf"))
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).to(query.dtype)
    return output


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    return None


KERNEL = AttentionKernel(name=REFERENCE, why_not=why_not, run=run)
