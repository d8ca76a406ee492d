"""Sums over columns that programs share: each adds up a part, the last to arrive adds the parts, in their order.

One launch, and the same bits every time: who is last decides who adds, not in which order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

# Programs that are wanted at once: a few for each of a large GPU's multiprocessors.
PROGRAMS = 528
MAX_SPLIT = 8


class SplitMemory:
    """What programs leave for the last one, on one device: 4-byte partial sums, and how many have arrived, per tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outgrown: list[torch.Tensor] = []  # captured graphs go on using what they were captured with
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def take(self, num_partials: int, num_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for so many sums, and a counter for each tile, which is 0 and is left at 0."""
        if num_partials > self._partials.numel():
            self._outgrow(self._partials)
            self._partials = torch.empty(num_partials, dtype=torch.float32, device=self._device)
        if num_tiles > self._arrived.numel():
            self._outgrow(self._arrived)
            self._arrived = torch.zeros(num_tiles, dtype=torch.int32, device=self._device)
        return self._partials, self._arrived

    def _outgrow(self, memory: torch.Tensor) -> None:
        self._outgrown.append(memory)
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a graph is being captured of a layer that did not run before; warm it up first")


_MEMORY: dict[torch.device, SplitMemory] = {}


def split_memory(device: torch.device) -> SplitMemory:
    """Return the one memory of a device: kernels of one stream use it one after the other."""
    if device not in _MEMORY:
        _MEMORY[device] = SplitMemory(device)
    return _MEMORY[device]


def split_for(num_tiles: int, num_blocks: int) -> int:
    """Return among how many programs the `num_blocks` blocks of columns of each of `num_tiles` tiles are divided."""
    split = 1
    while split < MAX_SPLIT and 2 * split * num_tiles <= PROGRAMS and 2 * split <= num_blocks:
        split *= 2
    return split


@triton.jit
def sum_splits(
    acc,
    partials,
    arrived,
    tile,
    num_tiles,
    num_columns,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return (sums [ROWS, COLUMNS], whether this program is the one that has them all).

    Of `acc`, the first `num_columns` columns matter; programs are numbered by tile (axis 0) and split (axis 1).
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row >= 0) & (column < num_columns)
    offset = row * COLUMNS + column
    here = partials + (tl.program_id(1) * num_tiles + tile) * (ROWS * COLUMNS)
    tl.store(here + offset, acc, mask=inside)
    tl.debug_barrier()  # all threads have written before one of them says so
    count = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
    is_last = count == SPLIT - 1
    if is_last:
        tl.debug_barrier()
        acc = tl.zeros_like(acc)
        if ROWS * COLUMNS <= 4096:
            for split in tl.static_range(SPLIT):  # unrolled: all loads are under way before the first sum
                part = partials + (split * num_tiles + tile) * (ROWS * COLUMNS)
                acc += tl.load(part + offset, mask=inside, other=0, cache_modifier=".cg")
        else:  # for which there are registers enough only while a tile is small
            for split in range(SPLIT):
                part = partials + (split * num_tiles + tile) * (ROWS * COLUMNS)
                acc += tl.load(part + offset, mask=inside, other=0, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return acc, is_last
