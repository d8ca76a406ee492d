"""Attention through PyTorch's fused CPU kernel, on views of the block pool: nothing is copied or padded.

One call per sequence, but for sequences that decode: those of equal length whose runs lie at equal distances are one
view. A call costs some 30 us before it computes anything, which is most of it while contexts are short.

Keys and values that are not stored in the compute type are decoded to it, those of one sequence at a time.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from pressd.runtime.kernels.attention.batch import (
    AttentionBatch,
    AttentionProblem,
    QueryRun,
    causal_mask,
)
from pressd.runtime.kernels.attention.kv_codes import sequence_numbers
from pressd.runtime.kernels.registry import AttentionKernel, Device


def run(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    batch: AttentionBatch,
    problem: AttentionProblem,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    output = torch.empty_like(query)
    attend_runs(query, key_blocks, value_blocks, batch.runs, problem, output, key_scales, value_scales)
    return output


def attend_runs(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    runs: Iterable[QueryRun],
    problem: AttentionProblem,
    output: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write the rows of output, shaped as query, that belong to `runs`."""
    as_computed = key_blocks.dtype == problem.dtype
    for parts in stacks(runs) if as_computed else [[part] for part in runs]:
        first = parts[0].first_visible(problem.window)
        if len(parts) > 1:
            keys, values = (_stacked(blocks, parts, first) for blocks in (key_blocks, value_blocks))
            rows = torch.tensor([part.start for part in parts])
            output.index_copy_(0, rows, _decode(query.index_select(0, rows), keys, values, problem))
            continue
        part = parts[0]
        rows_of_part = slice(part.start, part.start + part.length)
        keys = sequence_numbers(key_blocks, key_scales, part, first, problem.dtype).unsqueeze(0)
        values = sequence_numbers(value_blocks, value_scales, part, first, problem.dtype).unsqueeze(0)
        if part.length == 1:
            output[rows_of_part] = _decode(query[rows_of_part], keys, values, problem)
            continue
        whole = part.length == part.kv_length and (problem.window is None or part.length <= problem.window)
        output[rows_of_part] = scaled_dot_product_attention(
            query[rows_of_part].transpose(0, 1).unsqueeze(0),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if whole else causal_mask(part, problem.window, query.device, first),
            is_causal=whole,
            enable_gqa=problem.num_heads != problem.num_kv_heads,
            scale=problem.scale,
        )[0].transpose(0, 1)


def stacks(runs: Iterable[QueryRun]) -> list[list[QueryRun]]:
    """Divide runs into those that one view can hold: single tokens, equal lengths, blocks at equal distances."""
    alone: list[list[QueryRun]] = []
    decoding: dict[int, list[QueryRun]] = {}
    for part in runs:
        if part.length == 1 and part.first_block is not None:
            decoding.setdefault(part.kv_length, []).append(part)
        else:
            alone.append([part])
    for parts in decoding.values():
        stack: list[QueryRun] = []
        for part in sorted(parts, key=_first_block):
            if len(stack) > 1 and _first_block(part) - _first_block(stack[-1]) != _distance(stack):
                alone.append(stack)
                stack = []
            stack.append(part)
        alone.append(stack)
    return alone


def _first_block(part: QueryRun) -> int:
    assert part.first_block is not None
    return part.first_block


def _distance(stack: Sequence[QueryRun]) -> int:
    return _first_block(stack[1]) - _first_block(stack[0])


def _stacked(blocks: torch.Tensor, stack: Sequence[QueryRun], first: int) -> torch.Tensor:
    """Return keys or values [sequences, kv_length - first, kv_heads, head_dim] as one view of the pool."""
    _, block_size, kv_heads, head_dim = blocks.shape
    token = kv_heads * head_dim
    return blocks.as_strided(
        (len(stack), stack[0].kv_length - first, kv_heads, head_dim),
        (_distance(stack) * block_size * token, token, head_dim, 1),
        blocks.storage_offset() + (_first_block(stack[0]) * block_size + first) * token,
    )


def _decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, problem: AttentionProblem) -> torch.Tensor:
    """Attend with one token for each sequence, query [sequences, num_heads, head_dim] and keys as `_stacked` has them.

    The heads that share keys become the query rows, so nothing is expanded or masked.
    """
    group = problem.num_heads // problem.num_kv_heads
    packed = query.view(-1, problem.num_kv_heads, group, problem.head_dim)
    out = scaled_dot_product_attention(packed, keys.transpose(1, 2), values.transpose(1, 2), scale=problem.scale)
    return out.reshape(query.shape)


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"PyTorch has no fused kernel for {problem.dtype}"
    return None


KERNEL = AttentionKernel(name="cpu", why_not=why_not, run=run)
