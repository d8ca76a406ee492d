"""The block pool under random histories, against a model written with plain dictionaries."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pressd.runtime.blocks import BlockPool, Content
from pressd.runtime.prefix import full_blocks, root_key

ROOT = root_key(artifact_id="a", kv_dtype="bfloat16", cache_salt="")


def content(number: int) -> Content:
    return next(full_blocks(ROOT, [number, number], 2))


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish and release blocks while steps are launched and completed, up to three in flight.

    The model keeps what each holder has, the step that last touched each block, and what each published block says.
    """

    @initialize(num_blocks=st.integers(1, 24), contiguous=st.booleans())
    def begin(self, num_blocks: int, contiguous: bool) -> None:
        self.pool = BlockPool(num_blocks, 2, contiguous=contiguous)
        self.holders: dict[int, list[int]] = {}
        self.touched = dict.fromkeys(range(num_blocks), -1)
        self.launched = self.completed = -1
        self.next_owner = 1
        self.said: dict[int, Content] = {}

    def taken(self, blocks: list[int]) -> None:
        held = Counter(block for blocks_of in self.holders.values() for block in blocks_of)
        for block in blocks:
            assert held[block] == 0, "a block that somebody holds was handed out"
            assert self.touched[block] <= self.completed, "a block was handed out that a step in flight may touch"
            self.said.pop(block, None)

    @rule(count=st.integers(1, 8), room=st.integers(0, 12), whole=st.booleans())
    def allocate(self, count: int, room: int, whole: bool) -> None:
        available = self.pool.num_available
        blocks = self.pool.allocate(self.next_owner, count, wish=count + room, whole=whole)
        if blocks is None:
            assert count > available or (whole and self.pool.contiguous)
            return
        assert len(set(blocks)) == count <= available
        if whole and self.pool.contiguous:
            assert blocks == list(range(blocks[0], blocks[0] + count))
        self.taken(blocks)
        self.holders[self.next_owner] = blocks
        self.next_owner += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 3))
    def extend(self, data: st.DataObject, count: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.holders)))
        last = self.holders[owner][-1]
        blocks = self.pool.extend(owner, last, count, wish=count)
        wanted = list(range(last + 1, last + 1 + count))
        held = {block for blocks_of in self.holders.values() for block in blocks_of}
        free = all(b < self.pool.num_blocks and b not in held and self.touched[b] <= self.completed for b in wanted)
        assert blocks == (wanted if free else None)
        if blocks is not None:
            self.taken(blocks)
            self.holders[owner] += blocks

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def find_and_share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.said)))
        assert self.pool.find(self.said[block]) == block
        self.pool.share([block])
        self.holders[self.next_owner] = [block]
        self.next_owner += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.holders)))
        block = data.draw(st.sampled_from(self.holders[owner]))
        self.pool.publish(block, content(number))
        if block not in self.said and content(number) not in self.said.values():
            self.said[block] = content(number)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.holders)))
        step = data.draw(st.integers(-1, self.launched))
        for block in self.holders[owner]:
            self.touched[block] = max(self.touched[block], step)
        self.pool.release(self.holders.pop(owner), step)
        self.pool.forget_promises(owner)

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.said)))
        self.pool.forget([block])
        del self.said[block]

    @rule()
    def flush(self) -> None:
        idle = self.pool.num_cached
        assert self.pool.flush() == idle
        self.said = {}

    @precondition(lambda self: self.launched - self.completed < 3)
    @rule()
    def launch(self) -> None:
        self.launched += 1

    @precondition(lambda self: self.completed < self.launched)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.pool.complete(self.completed)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = [block for blocks in self.holders.values() for block in blocks]
        self.pool.check_integrity(held)
        assert self.pool.num_used == len(set(held))
        assert self.pool.num_cached == len(set(self.said) - set(held))
        free = [b for b in range(self.pool.num_blocks) if b not in held]
        assert self.pool.num_available == sum(self.touched[block] <= self.completed for block in free)
        assert all(self.pool.find(said) == block for block, said in self.said.items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=1500, stateful_step_count=30, deadline=None)


def test_a_run_that_grows_stays_contiguous_beside_others() -> None:
    """Each newcomer leaves those before it the room they wished for, while there is any."""
    pool = BlockPool(32, 4, contiguous=True)
    runs = {owner: pool.allocate(owner, 2, wish=8) for owner in (1, 2, 3, 4)}
    for owner, blocks in runs.items():
        assert blocks is not None
        for _ in range(6):
            more = pool.extend(owner, blocks[-1], 1, wish=1)
            assert more is not None
            blocks += more
        assert blocks == list(range(blocks[0], blocks[0] + 8))
    assert pool.num_available == 0


def test_promised_room_is_taken_when_there_is_no_other() -> None:
    pool = BlockPool(8, 4, contiguous=True)
    assert pool.allocate(1, 2, wish=8) == [0, 1]
    assert pool.allocate(2, 3, wish=3) == [2, 3, 4]
    assert pool.extend(1, 1, 1, wish=1) is None


@pytest.mark.parametrize("contiguous", [False, True])
def test_the_longest_unused_prefix_is_taken_first(contiguous: bool) -> None:
    pool = BlockPool(4, 2, contiguous=contiguous)
    blocks = pool.allocate(1, 4)
    assert blocks is not None
    for number, block in enumerate(blocks):
        pool.publish(block, content(number))
    for block in (blocks[2], blocks[0], blocks[3], blocks[1]):
        pool.release([block], -1)
    pool.share([blocks[2]])  # used again: now the youngest
    pool.release([blocks[2]], -1)
    taken = [pool.allocate(2 + n, 1) for n in range(4)]
    assert taken == [[blocks[0]], [blocks[3]], [blocks[1]], [blocks[2]]]
    assert pool.num_evicted == 4


def test_equal_keys_alone_are_no_hit() -> None:
    """Were two prefixes to collide in their 128 bits, the token ids would tell them apart."""
    pool = BlockPool(2, 2, contiguous=True)
    blocks = pool.allocate(1, 1)
    assert blocks is not None
    pool.publish(blocks[0], content(1))
    other = Content(parent=content(1).parent, token_ids=(7, 7), key=content(1).key)
    assert pool.find(content(1)) == blocks[0]
    assert pool.find(other) is None


def test_keys_depend_on_everything_before_them() -> None:
    tokens = list(range(12))
    chain = list(full_blocks(ROOT, tokens, 4))
    assert [block.token_ids for block in chain] == [tuple(tokens[:4]), tuple(tokens[4:8]), tuple(tokens[8:])]
    assert list(full_blocks(ROOT, tokens[:11], 4)) == chain[:2]
    assert list(full_blocks(chain[0].key, tokens[4:], 4)) == chain[1:], "a chain can be taken up where it was left"
    changed = list(full_blocks(ROOT, [9, *tokens[1:]], 4))
    assert all(a.key != b.key for a, b in zip(chain, changed, strict=True))
    same = {"artifact_id": "a", "kv_dtype": "bfloat16", "cache_salt": ""}
    for change in ({"artifact_id": "b"}, {"kv_dtype": "float32"}, {"cache_salt": "x"}, {"adapter": "x"}):
        assert root_key(**(same | change)) != ROOT
    assert root_key(artifact_id="ab", kv_dtype="c", cache_salt="") != root_key(
        artifact_id="a", kv_dtype="bc", cache_salt=""
    ), "the parts cannot run into each other"
