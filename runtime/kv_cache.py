"""Which sequence holds which KV blocks: one pool for each KV group, prefixes shared, windows slid. No torch.

A KV group is the layers that keep keys and values by the same rule: all of them, or those of a sliding window.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from pressd.runtime.blocks import BlockPool
from pressd.runtime.prefix import full_blocks, root_key
from pressd.runtime.sequence import BlockTable, Sequence

# Blocks a sequence is promised to grow into, at least; beyond, as many as its output has, so that it seldom moves. To
# promise all that it may ever need would evict what others find: with large max_new_tokens, half of all hits.
PROMISE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers with one block table: position i sees j > i - window, or every earlier one without a window."""

    layers: tuple[int, ...]
    window: int | None
    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Keys and values to copy in all layers of a group before the step computes."""

    group: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class KVCache:
    """Gives blocks to sequences, in every group or in none."""

    def __init__(
        self,
        groups: Many[KVGroup],
        block_size: int,
        *,
        contiguous: bool,
        prefix_cache: bool = True,
        artifact_id: str = "",
        kv_dtype: str = "",
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.pools = [BlockPool(group.num_blocks, block_size, contiguous=contiguous) for group in groups]
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_copied_blocks = 0
        self._prefix_cache = prefix_cache
        self._artifact_id, self._kv_dtype = artifact_id, kv_dtype
        self._copies: list[tuple[Sequence, BlockCopy]] = []
        self._owners = 0

    @property
    def num_fenced(self) -> int:
        """Blocks that nobody holds, but a step in flight may still touch."""
        return sum(pool.num_fenced for pool in self.pools)

    def demand(self, num_tokens: int, chunk: int) -> list[int]:
        """Return the most blocks per group that a sequence holds while it grows to `num_tokens` in steps of `chunk`."""
        return [most_blocks(group.window, num_tokens, chunk, self.block_size) for group in self.groups]

    def fits(self, num_tokens: int, chunk: int) -> bool:
        """Whether an empty cache holds such a sequence."""
        return all(
            need <= pool.num_blocks for need, pool in zip(self.demand(num_tokens, chunk), self.pools, strict=True)
        )

    def admit(self, sequence: Sequence, *, chunk: int, spare: int) -> bool:
        """Give a sequence blocks for what it has (behind a window: for its first `chunk`), and what is cached of it.

        False, and nothing taken, if fewer than `spare` blocks would be left in a group.
        """
        assert not sequence.tables
        hit, shared = self._match(sequence)
        needs = [self._first_need(sequence, group, hit, chunk) for group in self.groups]
        for pool, blocks, need in zip(self.pools, shared, needs, strict=True):
            if need + spare > pool.num_available - pool.num_unheld(blocks):
                return False
        self._owners += 1
        sequence.owner = self._owners
        for pool, blocks in zip(self.pools, shared, strict=True):
            pool.share(blocks)
        for group, need in enumerate(needs):
            table = BlockTable([0] * (hit // self.block_size - len(shared[group])))
            table.num_dropped = len(table.blocks)
            table.append(shared[group])
            sequence.tables.append(table)
            self._lengthen(sequence, group, need, spare)
        sequence.num_computed_tokens = sequence.num_settled_tokens = hit
        sequence.num_published_blocks = hit // self.block_size
        if not sequence.was_scheduled:
            sequence.num_cached_tokens = hit
            self.num_queried_tokens += sequence.num_prompt_tokens
            self.num_hit_tokens += hit
        return True

    def could_admit(self, sequence: Sequence, *, chunk: int, spare: int, without: Many[Sequence]) -> bool:
        """Whether `admit` could succeed if the sequences `without` gave back their blocks, cached or not."""
        needs = [self._first_need(sequence, group, 0, chunk) for group in self.groups]
        cached = (len(sequence.token_ids) - 1) // self.block_size
        for group, (pool, need) in enumerate(zip(self.pools, needs, strict=True)):
            freed = sum(len(other.tables[group].kept) for other in without)
            freed += sum(len(copy.sources) for owner, copy in self._copies if owner in without and copy.group == group)
            if need - cached + spare > pool.num_available + pool.num_fenced + freed:
                return False
        return True

    def grow(self, sequence: Sequence, until: int) -> bool:
        """Give a sequence blocks for its first `until` tokens; False, and nothing taken, if they are not there."""
        needs = [self.blocks_for(until) - len(table.blocks) for table in sequence.tables]
        if max(needs) <= 0:
            return True
        if any(need > pool.num_available for need, pool in zip(needs, self.pools, strict=True)):
            return False
        for group, need in enumerate(needs):
            if need > 0:
                self._lengthen(sequence, group, need, 0)
        return True

    def will_fit(self, sequence: Sequence, until: int) -> bool:
        """Whether `grow` needs only to wait for steps in flight."""
        need = self.blocks_for(until)
        return all(
            need - len(table.blocks) <= pool.num_available + pool.num_fenced
            for table, pool in zip(sequence.tables, self.pools, strict=True)
        )

    def slide(self, sequence: Sequence) -> None:
        """Give back the blocks that no window reaches any more.

        What a step in flight computes is settled, and published, first.
        """
        for group, table, pool in zip(self.groups, sequence.tables, self.pools, strict=True):
            if group.window is not None:
                pool.release(table.drop(self._behind(group.window, sequence.num_settled_tokens)), sequence.last_step)

    def settle(self, sequence: Sequence, until: int) -> None:
        """The first `until` tokens have exact keys and values, no step in flight: let their full blocks be found."""
        sequence.num_settled_tokens = until
        if not self._prefix_cache or sequence.request.bypass_prefix_cache:
            return
        done = until // self.block_size
        self._name_blocks(sequence, done)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            for place in range(max(table.num_dropped, sequence.num_published_blocks), done):
                pool.publish(table.blocks[place], sequence.contents[place])
        sequence.num_published_blocks = max(sequence.num_published_blocks, done)

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take all blocks back; with `forget`, none of them is found again."""
        for owner, copy in self._copies:
            if owner is sequence:  # moved while the step was planned, and now it is not part of it
                self.pools[copy.group].release(reversed(copy.sources), sequence.last_step)
        self._copies = [(owner, copy) for owner, copy in self._copies if owner is not sequence]
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            if forget:
                pool.forget(table.kept)
            # The end of a prefix is of use to fewer than its beginning: it is let go first, and so taken first.
            pool.release(reversed(table.kept), sequence.last_step)
            pool.forget_promises(sequence.owner)
        sequence.tables = []
        sequence.num_computed_tokens = sequence.num_settled_tokens = 0

    def take_copies(self, step: int) -> tuple[BlockCopy, ...]:
        """Return the copies that `step`, which has been planned, must make first; no later one touches the sources."""
        copies = tuple(copy for _, copy in self._copies)
        for copy in copies:
            self.pools[copy.group].release(reversed(copy.sources), step)
        self._copies = []
        self.num_copied_blocks += sum(len(copy.targets) for copy in copies)
        return copies

    def complete(self, step: int) -> None:
        """All steps up to `step` are over."""
        for pool in self.pools:
            pool.complete(step)

    def flush(self) -> int:
        """Forget every cached prefix; return the number of blocks that nobody held."""
        return sum(pool.flush() for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Assert that references are exactly the live sequences' tables, and that those cover what is computed."""
        sequences = list(live)
        for group, pool in enumerate(self.pools):
            pool.check_integrity(block for s in sequences if s.tables for block in s.tables[group].kept)
        for s in sequences:
            assert s.num_computed_tokens <= s.num_tokens
            for table in s.tables:
                assert s.num_computed_tokens <= len(table.blocks) * self.block_size
                run = list(range(table.kept[0], table.kept[0] + len(table.kept))) if table.kept else []
                assert (table.first_block is not None) == (table.kept == run != [])
                assert table.first_block is None or table.first_block + table.num_dropped == table.kept[0]

    def _behind(self, window: int, num_computed: int) -> int:
        """Return how many whole blocks neither the token at position `num_computed` nor any later one sees."""
        return max(0, num_computed - window + 1) // self.block_size

    def _first_need(self, sequence: Sequence, group: KVGroup, hit: int, chunk: int) -> int:
        until = sequence.num_tokens if group.window is None else min(sequence.num_tokens, hit + chunk)
        return self.blocks_for(until) - hit // self.block_size

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        """Compute the contents of a sequence's first `count` blocks, as far as they are not known."""
        if not sequence.contents:
            salt = sequence.request.cache_salt
            sequence.root = root_key(artifact_id=self._artifact_id, kv_dtype=self._kv_dtype, cache_salt=salt)
        known = len(sequence.contents)
        if count > known:
            parent = sequence.contents[-1].key if known else sequence.root
            tokens = sequence.token_ids[known * self.block_size : count * self.block_size]
            sequence.contents += full_blocks(parent, tokens, self.block_size)

    def _match(self, sequence: Sequence) -> tuple[int, list[list[int]]]:
        """Return the number of tokens whose keys and values every group has cached, and the blocks that hold them.

        At least one token is left to compute: its logits are wanted. Behind a window only the blocks that are still
        seen are asked for, and returned.
        """
        nothing: tuple[int, list[list[int]]] = (0, [[] for _ in self.groups])
        if not self._prefix_cache or not sequence.may_skip_prompt:
            return nothing
        limit = (len(sequence.token_ids) - 1) // self.block_size
        self._name_blocks(sequence, limit)
        contents = sequence.contents[:limit]
        full = [pool for group, pool in zip(self.groups, self.pools, strict=True) if group.window is None]
        for place, content in enumerate(contents):
            if any(pool.find(content) is None for pool in full):
                contents = contents[:place]
                break
        found = [[pool.find(content) for content in contents] for pool in self.pools]
        reach = [self._reach(group.window, blocks) for group, blocks in zip(self.groups, found, strict=True)]
        count = max(count for count in range(len(contents) + 1) if all(reaches[count] for reaches in reach))
        hit = count * self.block_size
        firsts = [0 if group.window is None else self._behind(group.window, hit) for group in self.groups]
        shared = [blocks[first:count] for first, blocks in zip(firsts, found, strict=True)]
        return hit, [[block for block in blocks if block is not None] for blocks in shared]

    def _reach(self, window: int | None, blocks: Many[int | None]) -> list[bool]:
        """For each number of blocks, whether those of them that are still seen are all there."""
        reaches, run = [True], 0
        for count, block in enumerate(blocks, start=1):
            run = run + 1 if block is not None else 0
            first = 0 if window is None else self._behind(window, count * self.block_size)
            reaches.append(run >= count - first)
        return reaches

    def _lengthen(self, sequence: Sequence, group: int, need: int, spare: int) -> None:
        """Append `need` blocks, which are available: behind the last, else with all in a new place, else anywhere."""
        table, pool, owner = sequence.tables[group], self.pools[group], sequence.owner
        kept = table.kept
        room = most_blocks(self.groups[group].window, sequence.max_length - 1, self.block_size, self.block_size)
        grown = len(table.blocks) - self.blocks_for(sequence.num_prompt_tokens)
        wish = max(len(kept) + need, min(room, len(kept) + need + max(PROMISE, grown)))
        if pool.contiguous and kept:
            behind = kept[-1] if table.first_block is not None else None
            # Whoever begins with a cached prefix must not take what else was cached behind it, if there is other room.
            for may_evict in (sequence.row is not None, True):
                if behind is not None and (may_evict or not pool.holds_any(range(behind + 1, behind + 1 + need))):
                    blocks = pool.extend(owner, behind, need, wish - len(kept))
                    if blocks is not None:
                        table.append(blocks)
                        return
                if len(kept) + need + spare <= pool.num_available:
                    blocks = pool.allocate(owner, len(kept) + need, wish=wish, whole=True)
                    if blocks is not None:
                        self._move(sequence, group, blocks)
                        return
        pieces = pool.allocate(owner, need, wish=wish - len(kept))
        assert pieces is not None, "the caller counted available blocks"
        table.append(pieces)

    def _move(self, sequence: Sequence, group: int, blocks: list[int]) -> None:
        """Copy what a sequence keeps to the first of `blocks`, and go on in the others.

        The sources are held until the step is planned: if the sequence is put back by then, they come free at once.
        """
        table = sequence.tables[group]
        count = len(table.kept)
        sources = table.move(blocks[:count])
        self._copies.append((sequence, BlockCopy(group, tuple(sources), tuple(blocks[:count]))))
        table.append(blocks[count:])


def most_blocks(window: int | None, num_tokens: int, chunk: int, block_size: int) -> int:
    """Return the most blocks that a sequence holds at once while it grows to `num_tokens` in steps of `chunk`."""
    whole = -(-num_tokens // block_size)
    if window is None:
        return whole
    # Positions computed - window + 1 ... computed + chunk - 1 are seen or written; they may begin inside a block.
    return min(whole, (window + chunk - 2) // block_size + 2)
