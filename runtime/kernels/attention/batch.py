"""What attention is asked to do in one step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Shapes of one attention layer; queries share keys and values in groups of num_heads / num_kv_heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRun:
    """The new tokens of one sequence: rows [start, start + length) of the step, the last of `kv_length` positions.

    `block_table` covers at least kv_length positions. `first_block` is set when the table is one contiguous run, so
    that keys and values can be read as a view.
    """

    start: int
    length: int
    kv_length: int
    block_table: tuple[int, ...]
    first_block: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """All sequences of a step; slot_mapping int64 [T] is where new keys and values go (block * block_size + offset)."""

    runs: tuple[QueryRun, ...]
    slot_mapping: torch.Tensor

    @property
    def num_gathers(self) -> int:
        """Sequences whose keys and values must be gathered, because their blocks are not contiguous."""
        return sum(run.first_block is None for run in self.runs)


def sequence_view(blocks: torch.Tensor, run: QueryRun) -> torch.Tensor:
    """Return keys or values of one sequence [kv_length, kv_heads, head_dim], as a view if its blocks are contiguous."""
    block_size = blocks.size(1)
    if run.first_block is not None:
        start = run.first_block * block_size
        return blocks.flatten(0, 1)[start : start + run.kv_length]
    num_blocks = -(-run.kv_length // block_size)
    table = torch.tensor(run.block_table[:num_blocks], device=blocks.device)
    return blocks.index_select(0, table).flatten(0, 1)[: run.kv_length]


def causal_mask(run: QueryRun, device: torch.device) -> torch.Tensor:
    """Return bool [length, kv_length], True where a new token may look: at itself and everything before it."""
    rows = torch.arange(run.kv_length - run.length, run.kv_length, device=device)
    return torch.arange(run.kv_length, device=device) <= rows[:, None]
