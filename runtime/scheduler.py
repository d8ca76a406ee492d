"""Who computes how many tokens in the next step. No torch.

One rule, no prefill or decode phase: every sequence has tokens that are known and tokens that are computed, and a step
hands out its budget so that the second catch up with the first. Chunked prefill, cached prefixes (the second start
higher) and preemption (they start again) follow from it.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from pressd.runtime.costs import StepBudget
from pressd.runtime.kv_cache import BlockCopy, KVCache
from pressd.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """The tokens [start, stop) of a sequence, to be computed in this step.

    With `draws` every token that is known will be computed, so that the next one is drawn. `is_first` in the step that
    takes the sequence out of the queue for the first time. `row` and `epoch` are the sequence's, as they were then.
    """

    sequence: Sequence
    start: int
    stop: int
    draws: bool
    is_first: bool
    row: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: which tokens of whom, which rows of the request table came free, who is new, what to copy first."""

    number: int
    rows: tuple[Scheduled, ...]
    released: tuple[int, ...]
    admitted: tuple[Sequence, ...]
    copies: tuple[BlockCopy, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.stop - item.start for item in self.rows)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens that are the newest of a sequence with output."""
        return sum(i.stop - i.start == 1 and i.start >= i.sequence.num_prompt_tokens for i in self.rows)


class Scheduler:
    """Divides each step's budget: one token for every sequence that decodes, then prompts, then newcomers.

    Within each, the higher priority goes first, then the earlier arrival. Blocks are given as they are needed; when
    they run out, the last in that order is put back into the queue, to be computed again later (its full blocks stay
    cached for as long as nobody needs them). So the first in order always gets on. A newcomer displaces only a lower
    priority.
    """

    def __init__(self, kv: KVCache, budget: StepBudget, *, max_batch: int, max_step_tokens: int) -> None:
        assert max_step_tokens >= max_batch
        self.num_preemptions = 0
        self._kv = kv
        self._budget = budget
        self._max_step_tokens = max_step_tokens
        self._waiting: list[tuple[tuple[int, float, int], Sequence]] = []  # a heap; who is not in _queued has left
        self._queued: set[Sequence] = set()
        self._num_preempted = 0
        self._running: list[Sequence] = []
        self._free_rows = list(range(max_batch))  # a heap
        self._step = -1
        self._left = 0  # tokens of the step being planned that nobody has yet
        self._work: dict[Sequence, int] = {}  # and those that were handed out
        self._admitted: list[Sequence] = []
        self._released: list[int] = []

    @property
    def num_waiting(self) -> int:
        return len(self._queued)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_preempted(self) -> int:
        """Sequences that wait to be computed again."""
        return self._num_preempted

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence could run to its end if it were alone; its last token is never computed."""
        tokens = max(sequence.num_prompt_tokens, sequence.max_length - 1)
        return self._kv.fits(tokens, self._max_step_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits."""
        assert self.fits(sequence)
        self._queue(sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Drop a sequence, waiting or running, and let go of its blocks; with `forget`, nobody finds them."""
        if sequence.row is not None:
            self._leave(sequence, forget=forget)
        else:
            self._unqueue(sequence)

    def complete(self, step: int) -> None:
        """All steps up to `step` are over: what they touched may be used again."""
        self._kv.complete(step)

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step; without rows if nobody can compute anything now."""
        self._step += 1
        self._work = {}
        for sequence in self._running:
            self._kv.slide(sequence)
        decoding = [s for s in self._running if s.num_pending_tokens == 1 and not s.waits_for_result]
        prompts = [s for s in self._running if s.num_pending_tokens > 1]
        self._left = self._budget.tokens(len(decoding))
        # A sequence that decodes has one pending token; serving those first keeps a long prompt from stalling them.
        for sequence in sorted(decoding, key=lambda s: s.order):
            self._serve(sequence)
        for sequence in sorted(prompts, key=lambda s: s.order):
            self._admit(now, above=sequence)
            self._serve(sequence)
        self._admit(now)
        return self._commit()

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Assert that rows and blocks belong to running sequences only, and that nobody is lost."""
        sequences = list(live)
        rows = [s.row for s in self._running]
        assert len(set(rows) | set(self._free_rows)) == len(rows) + len(self._free_rows)
        assert {id(s) for s in self._running} == {id(s) for s in sequences if s.row is not None}
        assert self._queued == {s for s in sequences if s.row is None} <= {s for _, s in self._waiting}
        assert self._num_preempted == sum(s.is_preempted for s in self._queued)
        assert all(bool(s.tables) == (s.row is not None) for s in sequences)
        self._kv.check_integrity(sequences)

    def _serve(self, sequence: Sequence) -> None:
        """Hand out tokens to a running sequence, unless it has been put back a moment ago."""
        wanted = min(sequence.num_pending_tokens, self._left)
        if sequence.row is not None and wanted > 0 and self._make_room(sequence, sequence.num_computed_tokens + wanted):
            self._work[sequence] = wanted
            self._left -= wanted

    def _make_room(self, sequence: Sequence, until: int) -> bool:
        """Get blocks for the first `until` tokens, at the cost of those behind in order. False: not in this step."""
        while not self._kv.grow(sequence, until):
            if self._kv.will_fit(sequence, until):
                return False  # a step in flight holds what is needed; it comes free without harm to anybody
            last = max(self._running, key=lambda s: s.order)
            if last is sequence:
                return False  # everybody else goes before it; it keeps what it has and waits
            self._preempt(last)
        return True

    def _admit(self, now: float, above: Sequence | None = None) -> None:
        """Take sequences from the queue while rows, blocks and budget last; of higher priority than `above` only."""
        passed: list[Sequence] = []
        while self._waiting and (above is None or self._waiting[0][0][0] < above.order[0]):
            sequence = heapq.heappop(self._waiting)[1]
            if sequence not in self._queued:
                continue
            self._unqueue(sequence)
            if not self._may_start(sequence):
                passed.append(sequence)
            elif self._place(sequence):
                self._begin(sequence, now)
            else:
                passed.append(sequence)
                break  # whoever comes later does not overtake
        for sequence in passed:
            self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        self._queued.add(sequence)
        self._num_preempted += sequence.is_preempted
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _unqueue(self, sequence: Sequence) -> None:
        self._queued.remove(sequence)
        self._num_preempted -= sequence.is_preempted
        if len(self._waiting) > 2 * len(self._queued) + 64:  # most of the heap has left
            self._waiting = [entry for entry in self._waiting if entry[1] in self._queued]
            heapq.heapify(self._waiting)

    def _may_start(self, sequence: Sequence) -> bool:
        """False while its result is in flight, or its sibling computes the same prompt."""
        if len(sequence.token_ids) < sequence.num_tokens:
            return False
        leader = sequence.leader
        return leader is None or leader.is_over or len(leader.token_ids) > leader.num_prompt_tokens

    def _place(self, sequence: Sequence) -> bool:
        """Find budget, a row and blocks for a sequence from the queue, at the cost of lower priorities."""
        before = self.num_preemptions
        while True:
            spare = len(self._running)  # a block each to go on with, lest the newcomer is put back at once
            if self._left > 0 and self._free_rows:
                if self._kv.admit(sequence, chunk=self._left, spare=spare):
                    return True
                if self.num_preemptions > before and self._kv.num_fenced:
                    return False  # what was taken from the first comes free when the step in flight is over
            last = max(self._running if self._left else self._work, key=lambda s: s.order, default=None)
            if last is None or last.order[0] <= sequence.order[0] or not self._is_worth_it(sequence):
                return False
            self._preempt(last)

    def _is_worth_it(self, sequence: Sequence) -> bool:
        """Whether a newcomer would fit if every lower priority gave way."""
        lower = [other for other in self._running if other.order[0] > sequence.order[0]]
        chunk, spare = max(1, self._left), len(self._running) - len(lower)
        return self._kv.could_admit(sequence, chunk=chunk, spare=spare, without=lower)

    def _begin(self, sequence: Sequence, now: float) -> None:
        sequence.row = heapq.heappop(self._free_rows)
        sequence.is_preempted = False
        sequence.scheduled_at = sequence.scheduled_at or now
        self._running.append(sequence)
        self._admitted.append(sequence)
        self._work[sequence] = min(sequence.num_pending_tokens, self._left)
        self._left -= self._work[sequence]

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue, without blocks."""
        self.num_preemptions += 1
        self._leave(sequence)
        sequence.is_preempted = True
        sequence.epoch += 1
        self._queue(sequence)

    def _leave(self, sequence: Sequence, *, forget: bool = False) -> None:
        assert sequence.row is not None
        self._left += self._work.pop(sequence, 0)
        if sequence in self._admitted:
            self._admitted.remove(sequence)  # and nobody ever hears of it
        else:
            self._released.append(sequence.row)
        self._running.remove(sequence)
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = None
        self._kv.release(sequence, forget=forget)

    def _commit(self) -> StepPlan:
        """Make the plan final: from here on what it computes counts as computed."""
        rows = tuple(self._scheduled(sequence, num_tokens) for sequence, num_tokens in self._work.items())
        for item in rows:
            sequence = item.sequence
            sequence.was_scheduled = True
            sequence.last_step = self._step
            sequence.num_computed_tokens = item.stop
            sequence.num_tokens += item.draws
        plan = StepPlan(
            number=self._step,
            rows=rows,
            released=tuple(self._released) if rows else (),
            admitted=tuple(self._admitted),
            copies=self._kv.take_copies(self._step),
        )
        self._admitted = []
        if rows:
            self._released = []
        return plan

    def _scheduled(self, sequence: Sequence, num_tokens: int) -> Scheduled:
        assert sequence.row is not None
        start = sequence.num_computed_tokens
        return Scheduled(
            sequence=sequence,
            start=start,
            stop=start + num_tokens,
            draws=start + num_tokens == sequence.num_tokens,
            is_first=not sequence.was_scheduled,
            row=sequence.row,
            epoch=sequence.epoch,
        )
