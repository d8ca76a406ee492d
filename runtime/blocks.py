"""The pool of KV blocks of one KV group: who holds which, what is cached, when it may be taken again. No torch."""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pressd.runtime.placement import Mask, find_pieces, find_window


@dataclass(frozen=True, slots=True)
class Content:
    """What a full block holds: the key of its prefix, its own tokens, and the key of the prefix that ends with them."""

    parent: bytes
    token_ids: tuple[int, ...]
    key: bytes


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, counted references, and a cache of full blocks by content.

    A block that nobody holds stays findable until it is taken, the longest unused first. It is taken only after the
    step that last touched it has completed (`release` names the step, `complete` ends it). With `contiguous`, blocks
    come as runs that can grow, so that a CPU reads a sequence's keys and values as one view; without, in the order they
    came free.
    """

    def __init__(self, num_blocks: int, block_size: int, *, contiguous: bool) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.contiguous = contiguous
        self.num_evicted = 0
        self._refs = np.zeros(num_blocks, dtype=np.int64)
        self._fences = np.full(num_blocks, -1, dtype=np.int64)  # the step that last touched a block
        self._stamps = np.zeros(num_blocks, dtype=np.int64)  # when an idle block was let go; 0 for all others
        self._promised = np.zeros(num_blocks, dtype=np.int64)  # the owner who would like to grow into it; 0 for nobody
        self._clock = 0
        self._completed = -1
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # held by nobody, nothing cached
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, cached; the longest unused first
        # Held by nobody, but a step in flight may touch them; and a heap of (step, clock, block) that says until when.
        self._fenced: dict[int, None] = {}
        self._lifts: list[tuple[int, int, int]] = []
        self._contents: dict[int, Content] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._blank) + len(self._idle)

    @property
    def num_fenced(self) -> int:
        """Blocks that nobody holds, but a step in flight may still touch."""
        return len(self._fenced)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._blank) - len(self._idle) - len(self._fenced)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that a later prefix may find."""
        return len(self._idle) + sum(block in self._contents for block in self._fenced)

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks could be taken now, were they not wanted for what they hold."""
        return sum(block in self._idle for block in blocks)

    def holds_any(self, blocks: Iterable[int]) -> bool:
        """Whether any of these blocks holds something that can be found."""
        return any(block in self._contents for block in blocks)

    def allocate(self, owner: int, count: int, *, wish: int = 0, whole: bool = False) -> list[int] | None:
        """Take `count` blocks, or return None and take nothing.

        `owner` is promised the room behind them, up to `wish` blocks in all.
        `whole` insists on a contiguous run; without it, pieces are taken where there is no run.
        """
        assert count > 0
        if count > self.num_available:
            return None
        if not self.contiguous:
            return [self._take((self._next(),))[0] for _ in range(count)]
        available = self._available()
        promised = (self._promised != 0) & (self._promised != owner)
        start = find_window(available, promised, self._stamps, count, wish)
        if start is None:
            return None if whole else self._take(find_pieces(available, promised, self._stamps, count))
        self._promise(owner, start + count, start + max(count, wish))
        return self._take(range(start, start + count))

    def extend(self, owner: int, behind: int, count: int, wish: int) -> list[int] | None:
        """Take the `count` blocks that follow block `behind`, or return None and take nothing.

        `owner` is promised the room behind those, up to `wish` in all.
        """
        blocks = range(behind + 1, behind + 1 + count)
        if blocks.stop > self.num_blocks or any(self._refs[b] or self._is_fenced(b) for b in blocks):
            return None
        self._promise(owner, blocks.stop, blocks.start + max(count, wish))
        return self._take(blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find` named, beside whoever holds them already."""
        for block in blocks:
            if self._refs[block] == 0:
                self._fenced.pop(block, None)
                self._idle.pop(block, None)
                self._stamps[block] = 0
            self._refs[block] += 1

    def release(self, blocks: Iterable[int], step: int) -> None:
        """Let go of blocks that no step after `step` touches for this holder."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is held by nobody"
            self._refs[block] -= 1
            self._fences[block] = max(self._fences[block], step)
            if self._refs[block] > 0:
                continue
            if self._is_fenced(block):
                self._clock += 1
                self._fenced[block] = None
                heapq.heappush(self._lifts, (int(self._fences[block]), self._clock, block))
            else:
                self._lay_down(block)

    def forget_promises(self, owner: int) -> None:
        """Open to everybody the room that `owner` could have grown into."""
        self._promised[self._promised == owner] = 0

    def complete(self, step: int) -> None:
        """All steps up to `step` are over."""
        self._completed = max(self._completed, step)
        while self._lifts and self._lifts[0][0] <= self._completed:
            block = heapq.heappop(self._lifts)[2]
            if block in self._fenced and not self._is_fenced(block):
                del self._fenced[block]
                self._lay_down(block)

    def publish(self, block: int, content: Content) -> None:
        """Let a full block be found, unless another block holds the same already."""
        assert self._refs[block] > 0
        if content.key not in self._by_key and block not in self._contents:
            self._contents[block] = content
            self._by_key[content.key] = block

    def find(self, content: Content) -> int | None:
        """Return the block that holds this content. Token ids are compared: equal keys alone prove nothing."""
        block = self._by_key.get(content.key)
        return block if block is not None and self._contents[block] == content else None

    def forget(self, blocks: Sequence[int]) -> None:
        """Let these blocks be found no more."""
        for block in blocks:
            self._drop_content(block)
            if block in self._idle:
                del self._idle[block]
                self._stamps[block] = 0
                self._blank[block] = None

    def flush(self) -> int:
        """Forget every cached block; return how many nobody held. Those held go on, unfindable."""
        cached = self.num_cached
        self.forget(list(self._contents))
        return cached

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that references are exactly those of `held` (a block may appear several times); the rest adds up."""
        counts = np.bincount(np.fromiter(held, dtype=np.int64), minlength=self.num_blocks)
        assert (counts == self._refs).all(), "references do not match the holders"
        blank, idle, fenced = set(self._blank), set(self._idle), set(self._fenced)
        assert len(blank) + len(idle) + len(fenced) == len(blank | idle | fenced)
        assert blank | idle | fenced == set(np.flatnonzero(self._refs == 0).tolist())
        assert fenced == {block for block in fenced if self._is_fenced(block)} <= {block for *_, block in self._lifts}
        assert all(block in self._contents for block in idle)
        assert not any(block in self._contents for block in blank)
        assert {content.key: block for block, content in self._contents.items()} == self._by_key
        assert set(np.flatnonzero(self._stamps).tolist()) == idle
        assert set(np.flatnonzero(self._available()).tolist()) == blank | idle

    def _available(self) -> Mask:
        mask: Mask = (self._refs == 0) & (self._fences <= self._completed)
        return mask

    def _is_fenced(self, block: int) -> bool:
        return bool(self._fences[block] > self._completed)

    def _next(self) -> int:
        """Return the block that has been free longest, an unfindable one first."""
        return next(iter(self._blank or self._idle))

    def _take(self, blocks: Iterable[int]) -> list[int]:
        taken = list(blocks)
        for block in taken:
            self._pick_up(block)
            self._promised[block] = 0
            self._refs[block] = 1
        return taken

    def _pick_up(self, block: int) -> None:
        """Take a block that nobody holds from its queue, and let its content be found no more."""
        if block in self._idle:
            del self._idle[block]
            self._stamps[block] = 0
            self.num_evicted += 1
            self._drop_content(block)
        else:
            del self._blank[block]

    def _lay_down(self, block: int) -> None:
        """Put a block that nobody holds any more into its queue."""
        if block in self._contents:
            self._clock += 1
            self._stamps[block] = self._clock
            self._idle[block] = None
        else:
            self._blank[block] = None

    def _promise(self, owner: int, start: int, stop: int) -> None:
        self.forget_promises(owner)
        room = self._promised[start : min(stop, self.num_blocks)]
        room[(room == 0) & self._available()[start : start + room.size]] = owner

    def _drop_content(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._by_key[content.key]
