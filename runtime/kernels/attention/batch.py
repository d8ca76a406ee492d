"""What attention is asked to do in one step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

# Sequences with at most so many new tokens are attended to as decoding is: one more token than a draft has.
MAX_DECODE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How keys and values are stored: in `dtype` (None: as they are computed), and what their codes are multiplied by.

    `scales`: "token" is one for each token and head, float32, which lies beside the codes; "layer" is one for all keys
    of a layer and one for its values; "none" goes with floating-point numbers, which mean themselves.
    """

    dtype: torch.dtype | None = None
    scales: Literal["none", "token", "layer"] = "none"


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
    kv: KVFormat = KVFormat()

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The type that keys and values are stored in."""
        return self.dtype if self.kv.dtype is None else self.kv.dtype

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer, with the scales that lie beside them."""
        scale_bytes = torch.float32.itemsize if self.kv.scales == "token" else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.kv_dtype.itemsize + scale_bytes)

    def why_not_as_computed(self) -> str | None:
        """Return None if keys and values are stored as they are computed, else what such a kernel says of it."""
        if self.kv_dtype == self.dtype:
            return None
        computed, stored = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype))
        return f"reads keys and values in {computed}, as it computes, not in {stored}"


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
class PagedBatch:
    """Sequences of a step as a kernel reads them on the device, S places.

    The new tokens of a sequence are rows [starts, starts + lengths) of the step, the last of `kv_lengths` positions; at
    an empty place both are 0. `rows` tells its row of `block_tables` [R, P], whose entry j is the block of positions
    j * block_size and on. All are int32 tensors. `max_query` and `max_kv` are bounds that the host knows.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    kv_lengths: torch.Tensor
    rows: torch.Tensor
    block_tables: torch.Tensor
    max_query: int
    max_kv: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """All sequences of a step; slot_mapping int64 [T] is where new keys and values go (block * block_size + offset).

    A kernel keeps in `memo` what it has made of it, for the layers that follow.

    `runs` is what the host knows of them. Kernels that follow block tables on a device read `decoding`, of sequences
    with up to MAX_DECODE new tokens, and `prompts`, of those with more; None where there are none, or no such kernel.
    """

    runs: tuple[QueryRun, ...]
    slot_mapping: torch.Tensor
    decoding: PagedBatch | None = None
    prompts: PagedBatch | None = None
    memo: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_gathers(self) -> int:
        """Sequences whose keys and values must be gathered, because their blocks are not contiguous."""
        return sum(run.first_block is None for run in self.runs)


def page(
    runs: Sequence[QueryRun], block_size: int, device: torch.device
) -> tuple[PagedBatch | None, PagedBatch | None]:
    """Return what the host knows of sequences as kernels read it: those that decode, and prompts; None for none."""
    few = [run for run in runs if run.length <= MAX_DECODE]
    many = [run for run in runs if run.length > MAX_DECODE]
    return _paged(few, block_size, device), _paged(many, block_size, device)


def _paged(runs: Sequence[QueryRun], block_size: int, device: torch.device) -> PagedBatch | None:
    if not runs:
        return None
    tables = [list(run.block_table[: -(-run.kv_length // block_size)]) for run in runs]
    widest = max(map(len, tables))
    columns = [(run.start, run.length, run.kv_length, row) for row, run in enumerate(runs)]
    starts, lengths, kv_lengths, rows = torch.tensor(columns, dtype=torch.int32).t().contiguous().to(device)
    return PagedBatch(
        starts=starts,
        lengths=lengths,
        kv_lengths=kv_lengths,
        rows=rows,
        block_tables=torch.tensor([[*t, *[0] * (widest - len(t))] for t in tables], dtype=torch.int32).to(device),
        max_query=max(run.length for run in runs),
        max_kv=max(run.kv_length for run in runs),
    )


def paged_runs(batch: AttentionBatch, block_size: int) -> list[QueryRun]:
    """Return the sequences of a batch that only the device knows; on a GPU this waits for it."""
    runs = []
    for paged in (batch.decoding, batch.prompts):
        if paged is None:
            continue
        columns = torch.stack((paged.starts, paged.lengths, paged.kv_lengths, paged.rows)).t().tolist()
        for start, length, kv_length, row in columns:
            if kv_length:
                table = paged.block_tables[row, : -(-kv_length // block_size)].tolist()
                runs.append(
                    QueryRun(start=start, length=length, kv_length=kv_length, block_table=table, first_block=None)
                )
    return runs


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
