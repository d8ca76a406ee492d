"""The block pool against a model of it: a set of free blocks."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pressd.runtime.blocks import BlockPool

NUM_BLOCKS = 24


class PoolMachine(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=16)
        self.free = set(range(NUM_BLOCKS))

    @rule(target=held, count=st.integers(1, NUM_BLOCKS + 2))
    def allocate(self, count: int) -> tuple[int, ...]:
        longest = self.longest_free_run()
        blocks = self.pool.allocate(count)
        if count > len(self.free):
            assert blocks is None
            return ()
        assert blocks is not None
        assert len(set(blocks)) == count
        assert set(blocks) <= self.free
        if count <= longest:
            assert blocks == tuple(range(blocks[0], blocks[0] + count)), "a contiguous run was free"
        self.free -= set(blocks)
        return blocks

    @rule(blocks=consumes(held))
    def give_back(self, blocks: tuple[int, ...]) -> None:
        self.pool.free(blocks)
        self.free |= set(blocks)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_used == NUM_BLOCKS - len(self.free)

    def longest_free_run(self) -> int:
        longest = run = 0
        for block in range(NUM_BLOCKS):
            run = run + 1 if block in self.free else 0
            longest = max(longest, run)
        return longest


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_double_free_is_caught() -> None:
    pool = BlockPool(8, block_size=4)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.free(blocks)
    for block in blocks:
        with pytest.raises(AssertionError, match="free already"):
            pool.free((block,))


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(8, block_size=4)
    assert [pool.blocks_for(tokens) for tokens in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
