"""Attention on a CPU with generated code for sequences that decode; prompts go through PyTorch's fused kernel."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from pressd.runtime.kernels.attention import cpu, cpu_prompt
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, QueryRun
from pressd.runtime.kernels.attention.cpu_decode import Shape, attend, why_not_shape
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.registry import AttentionKernel, Device
from pressd.runtime.kernels.vnni_linear import why_no_vnni


@dataclass(frozen=True, slots=True)
class Split:
    """The single tokens of a batch as `attend` reads them, blocks of prompts likewise, and the runs that remain."""

    sequences: torch.Tensor
    segments: torch.Tensor
    blocks: torch.Tensor
    others: tuple[QueryRun, ...]


def run(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    batch: AttentionBatch,
    problem: AttentionProblem,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    assert key_scales is None is value_scales, "codes are refused"
    output = allocate(tuple(query.shape), query.dtype)
    key = split_key(problem, key_blocks.size(1))
    split = batch.memo.get(key)
    if not isinstance(split, Split):
        split = batch.memo[key] = _split(batch.runs, problem, key_blocks.size(1))
    if split.sequences.size(0):
        attend(query, key_blocks, value_blocks, output, split.sequences, split.segments, _shape(problem))
    if split.blocks.size(0):
        shape = _prompt_shape(problem)
        cpu_prompt.attend(query, key_blocks, value_blocks, output, split.blocks, problem.window, shape)
    if split.others:
        cpu.attend_runs(query, key_blocks, value_blocks, split.others, problem, output)
    return output


def split_key(problem: AttentionProblem, block_size: int) -> Hashable:
    """Return where a batch's memo has the Split of such layers."""
    return ("split", problem, block_size)


def single_tokens(count: int) -> Split:
    """Return a split of so many single tokens, each with one segment: the first slot, until it is told otherwise."""
    order = torch.arange(count)
    return Split(
        sequences=torch.stack((order, order, order + 1), dim=1),
        segments=torch.tensor([[0, 1]]).repeat(count, 1),
        blocks=torch.empty(0, 4, dtype=torch.int64),
        others=(),
    )


def _split(runs: Sequence[QueryRun], problem: AttentionProblem, block_size: int) -> Split:
    sequences: list[tuple[int, int, int]] = []
    segments: list[tuple[int, int]] = []
    blocks: list[tuple[int, int, int, int]] = []
    others: list[QueryRun] = []
    shape = _prompt_shape(problem)
    writes_prompts = cpu_prompt.why_not_shape(shape.group, shape.head_dim, problem.dtype) is None
    for part in runs:
        if part.length == 1:
            before = len(segments)
            segments += segments_of(part, part.first_visible(problem.window), block_size)
            sequences.append((part.start, before, len(segments)))
        elif writes_prompts and part.first_block is not None:
            before_it = part.kv_length - part.length
            for first in range(0, part.length, shape.tokens):
                tokens = min(shape.tokens, part.length - first)
                blocks.append((part.start + first, tokens, before_it + first, part.first_block * block_size))
        else:
            others.append(part)
    return Split(
        torch.tensor(sequences, dtype=torch.int64).view(-1, 3),
        torch.tensor(segments, dtype=torch.int64).view(-1, 2),
        torch.tensor(blocks, dtype=torch.int64).view(-1, 4),
        tuple(others),
    )


def segments_of(part: QueryRun, first: int, block_size: int) -> list[tuple[int, int]]:
    """Return where the positions from `first` on lie: the first slot of each run of slots, and its length."""
    if part.first_block is not None:
        return [(part.first_block * block_size + first, part.kv_length - first)]
    found = []
    for position in range(first - first % block_size, part.kv_length, block_size):
        start, stop = max(first, position), min(position + block_size, part.kv_length)
        found.append((part.block_table[position // block_size] * block_size + start - position, stop - start))
    return found


def _shape(problem: AttentionProblem) -> Shape:
    return Shape(
        group=problem.num_heads // problem.num_kv_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        scale=problem.scale,
    )


def _prompt_shape(problem: AttentionProblem) -> cpu_prompt.Shape:
    group = problem.num_heads // problem.num_kv_heads
    return cpu_prompt.Shape(group=group, head_dim=problem.head_dim, scale=problem.scale)


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    return why_no_vnni(device) or problem.why_not_as_computed() or why_not_shape(_shape(problem))


KERNEL = AttentionKernel(name="cpu-generated", why_not=why_not, run=run, is_generated=True)
