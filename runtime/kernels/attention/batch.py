"""What attention is asked to do in one step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Shapes of one attention layer; queries share keys and values in groups of num_heads / num_kv_heads.

    With a `window`, position i sees positions j with i - window < j <= i; without, all j <= i. Nothing else is read:
    the blocks of what no window reaches any more may hold another sequence by now.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRun:
    """The new tokens of one sequence: rows [start, start + length) of the step, the last of `kv_length` positions.

    `block_table` covers at least kv_length positions; entries behind the window mean nothing. `first_block` is set when
    the others are one contiguous run, so that keys and values can be read as a view: the block that entry 0 has or
    would have (it may be negative).
    """

    start: int
    length: int
    kv_length: int
    block_table: Sequence[int]
    first_block: int | None

    def first_visible(self, window: int | None) -> int:
        """Return the first position that any of the new tokens sees."""
        return 0 if window is None else max(0, self.kv_length - self.length + 1 - window)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """All sequences of a step; slot_mapping int64 [T] is where new keys and values go (block * block_size + offset)."""

    runs: tuple[QueryRun, ...]
    slot_mapping: torch.Tensor

    @property
    def num_gathers(self) -> int:
        """Sequences whose keys and values must be gathered, because their blocks are not contiguous."""
        return sum(run.first_block is None for run in self.runs)


def sequence_view(blocks: torch.Tensor, run: QueryRun, first: int = 0) -> torch.Tensor:
    """Return keys or values [kv_length - first, kv_heads, head_dim] of one sequence from position `first` on.

    It is a view if the sequence's blocks are contiguous.
    """
    block_size = blocks.size(1)
    if run.first_block is not None:
        start = run.first_block * block_size
        return blocks.flatten(0, 1)[start + first : start + run.kv_length]
    skipped, num_blocks = first // block_size, -(-run.kv_length // block_size)
    table = torch.tensor(run.block_table[skipped:num_blocks], device=blocks.device)
    start = skipped * block_size
    return blocks.index_select(0, table).flatten(0, 1)[first - start : run.kv_length - start]


def causal_mask(run: QueryRun, window: int | None, device: torch.device, first: int = 0) -> torch.Tensor:
    """Return bool [length, kv_length - first], True where a new token may look, for positions from `first` on."""
    rows = torch.arange(run.kv_length - run.length, run.kv_length, device=device)[:, None]
    columns = torch.arange(first, run.kv_length, device=device)
    return columns <= rows if window is None else (columns <= rows) & (columns > rows - window)
