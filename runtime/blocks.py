"""The pool of KV blocks: who owns which, and runs as contiguous as they can be. No torch."""

from bisect import bisect_left


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, handed out in contiguous runs where free space allows.

    Contiguous runs let a CPU read a sequence's keys and values as one view instead of gathering them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._starts = [0]  # first blocks of the free runs, ascending; no two runs touch
        self._lengths = {0: num_blocks}
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> tuple[int, ...] | None:
        """Take `num_blocks` blocks, or return None (and take nothing) if fewer are free.

        The smallest free run that holds them all is used; if none does, the largest runs are used up first.
        """
        assert num_blocks > 0
        if num_blocks > self._num_free:
            return None
        fitting = [start for start in self._starts if self._lengths[start] >= num_blocks]
        if fitting:
            return tuple(self._take(min(fitting, key=self._lengths.__getitem__), num_blocks))
        blocks: list[int] = []
        for start in sorted(self._starts, key=lambda start: -self._lengths[start]):
            blocks += self._take(start, min(self._lengths[start], num_blocks - len(blocks)))
            if len(blocks) == num_blocks:
                break
        return tuple(blocks)

    def free(self, blocks: tuple[int, ...]) -> None:
        """Give blocks back; a block that is free already is a bug of the caller."""
        for block in blocks:
            self._give(block)

    def check_integrity(self) -> None:
        """Assert that the free runs are ordered, apart, inside the pool and add up."""
        assert self._starts == sorted(self._lengths)
        previous_end = -1
        for start in self._starts:
            length = self._lengths[start]
            assert length > 0
            assert start > previous_end, f"free run {start} touches or overlaps the one before"
            previous_end = start + length
        assert previous_end <= self.num_blocks
        assert sum(self._lengths.values()) == self._num_free

    def _take(self, start: int, num_blocks: int) -> range:
        length = self._lengths.pop(start)
        index = bisect_left(self._starts, start)
        if length > num_blocks:
            self._starts[index] = start + num_blocks
            self._lengths[start + num_blocks] = length - num_blocks
        else:
            del self._starts[index]
        self._num_free -= num_blocks
        return range(start, start + num_blocks)

    def _give(self, block: int) -> None:
        assert 0 <= block < self.num_blocks, f"block {block} is not of this pool"
        index = bisect_left(self._starts, block)
        before = self._starts[index - 1] if index else None
        after = self._starts[index] if index < len(self._starts) else None
        assert after != block, f"block {block} is free already"
        assert before is None or before + self._lengths[before] <= block, f"block {block} is free already"
        length = 1
        if after == block + 1:
            length += self._lengths.pop(after)
            del self._starts[index]
        if before is not None and before + self._lengths[before] == block:
            self._lengths[before] += length
        else:
            self._starts.insert(index, block)
            self._lengths[block] = length
        self._num_free += 1
