"""The scheduler and the KV cache under random histories: right tokens, budgets kept, nobody starved, nothing leaked."""

from typing import Any

import paper_engine as paper
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pressd.runtime.kv_cache import KVGroup, most_blocks
from pressd.runtime.sequence import Sequence

LONGEST = 48
WINDOWS: dict[str, list[int | None]] = {"full": [None], "window": [6], "mixed": [None, 5, 9]}
STEMS = [(1, 2, 0, 1, 1, 2, 0, 0, 2), (1, 2, 0, 1, 2, 2), (2,)]
prompts = st.builds(
    lambda stem, end: (*stem, *end), st.sampled_from(STEMS), st.lists(st.integers(0, 2), max_size=18).map(tuple)
)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of several priorities and salts come, go and are cancelled in a pool that is often too small."""

    @initialize(
        kind=st.sampled_from(sorted(WINDOWS)),
        block_size=st.integers(1, 4),
        max_batch=st.integers(1, 4),
        slack=st.integers(0, 12),
        depth=st.integers(0, 1),
        contiguous=st.booleans(),
        room=st.integers(0, 30),
    )
    def begin(
        self, kind: str, block_size: int, max_batch: int, slack: int, depth: int, contiguous: bool, room: int
    ) -> None:
        chunk = max_batch + slack
        groups = [
            KVGroup(
                layers=(0,), window=w, num_blocks=most_blocks(w, LONGEST - 1, chunk, block_size) + room // block_size
            )
            for w in WINDOWS[kind]
        ]
        self.engine = paper.PaperEngine(
            groups, block_size, max_batch=max_batch, chunk=chunk, depth=depth, contiguous=contiguous
        )
        self.whole: list[Sequence] = []

    @rule(
        prompt=prompts,
        output=st.integers(1, 18),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        salt=st.sampled_from(["", "", "s"]),
        bypass=st.sampled_from([False, False, False, True]),
    )
    def add(self, prompt: tuple[int, ...], output: int, priority: int, salt: str, bypass: bool) -> None:
        sequence = self.engine.sequence(prompt, output, priority, salt, bypass)
        assert len(prompt) + output <= LONGEST
        assert self.engine.scheduler.fits(sequence)
        self.engine.add(sequence)
        self.whole.append(sequence)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            before = {s: s.num_computed_tokens for s in self.engine.live}
            plan = self.engine.step()
            if self.engine.depth == 0 and before:
                # The first in order always gets on: nobody is starved, nothing locks up.
                first = min(before, key=lambda s: s.order)
                assert any(item.sequence is first for item in plan.rows)

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.engine.live))
        self.engine.end(victim)
        self.whole.remove(victim)

    @rule()
    def flush(self) -> None:
        self.engine.kv.flush()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity(self.engine.live)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        tokens = sum(len(s.request.prompt_token_ids) + s.max_length for s in self.whole)
        self.engine.drain(most=20 + 40 * tokens)
        for sequence in self.whole:
            assert self.engine.outputs[sequence.request.request_id] == paper.expected(sequence)
        for pool in self.engine.kv.pools:
            assert pool.num_used == 0
        assert self.engine.scheduler.num_running == self.engine.scheduler.num_waiting == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=1500, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def make(num_blocks: int, *, max_batch: int = 4, chunk: int = 16, contiguous: bool = True, depth: int = 0) -> Any:
    group = KVGroup(layers=(0,), window=None, num_blocks=num_blocks)
    return paper.PaperEngine([group], 4, max_batch=max_batch, chunk=chunk, depth=depth, contiguous=contiguous)


def run(engine: Any, *asked: tuple[tuple[int, ...], int, int]) -> list[Sequence]:
    sequences = [engine.sequence(*one) for one in asked]
    for sequence in sequences:
        engine.add(sequence)
    return sequences


def test_decoding_goes_before_prompts_and_a_long_prompt_comes_in_pieces() -> None:
    engine = make(32, chunk=6)
    (first,) = run(engine, ((1, 2, 0), 8, 0))
    engine.step()
    (long,) = run(engine, (tuple(range(3)) * 6, 4, 0))
    shares = []
    while long.num_computed_tokens < 18:
        shares.append([(item.sequence is first, item.stop - item.start) for item in engine.step().rows])
    assert shares == [[(True, 1), (False, 5)]] * 3 + [[(True, 1), (False, 3)]]


def test_a_higher_priority_goes_first_and_displaces_a_lower() -> None:
    engine = make(8, max_batch=2)
    low, lower = run(engine, ((1, 1), 20, 0), ((1, 2), 20, -1))
    engine.step()
    (urgent,) = run(engine, ((2, 2), 3, 5))
    engine.step()
    assert (low.row is None, lower.row is None, urgent.row is None) == (False, True, False)
    assert engine.scheduler.num_preempted == 1
    (equal,) = run(engine, ((0, 0), 3, 0))
    engine.step()
    assert equal.row is None, "an equal priority displaces nobody"
    engine.drain(200)
    assert all(engine.outputs[s.request.request_id] == paper.expected(s) for s in (low, lower, urgent, equal))


def test_when_blocks_run_out_the_last_is_put_back_and_starts_from_the_cache() -> None:
    engine = make(7)
    early, late = run(engine, ((1, 1, 0, 2), 20, 0), ((2, 1, 0, 2), 20, 0))
    while engine.scheduler.num_preemptions == 0:
        engine.step()
    assert early.row is not None
    assert late.row is None
    engine.drain(200)
    assert engine.outputs["1"] == paper.expected(early)
    assert engine.outputs["2"] == paper.expected(late)


def test_a_move_of_one_that_is_displaced_holds_up_nobody() -> None:
    """The blocks it moved from in the step being planned are free again with those it moved to."""
    groups = [
        KVGroup(layers=(0,), window=w, num_blocks=most_blocks(w, LONGEST - 1, 9, 1) + 3) for w in WINDOWS["mixed"]
    ]
    engine = paper.PaperEngine(groups, 1, max_batch=2, chunk=9, depth=0, contiguous=True)
    run(engine, ((2, 0, 0, 0), 6, 0), *[(STEMS[0], 1, 0)] * 5, ((*STEMS[0], 0), 4, 1))
    for _ in range(6):
        engine.step()
    (urgent,) = run(engine, (STEMS[0], 1, 1))
    assert urgent in {item.sequence for item in engine.step().rows}


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_cached_prefix_is_found_shared_and_goes_on_in_place(contiguous: bool) -> None:
    """The next turn of a conversation begins with all of the last: on a CPU it goes on in the same run of blocks."""
    engine = make(32, contiguous=contiguous)
    (turn,) = run(engine, (STEMS[0], 8, 0))
    engine.drain(50)
    (following,) = run(engine, ((*turn.token_ids, 1, 1, 2), 4, 0))
    plan = engine.step()
    assert following.num_cached_tokens == plan.rows[0].start == 16  # 17 tokens: the last block of four is not full
    assert following.tables[0].first_block is not None
    assert engine.kv.num_copied_blocks == 0
    engine.drain(50)
    assert engine.outputs["2"] == paper.expected(following)


def test_a_prefix_in_use_is_copied_on_a_cpu_and_shared_elsewhere() -> None:
    for contiguous in (True, False):
        engine = make(32, contiguous=contiguous)
        (first,) = run(engine, (STEMS[0], 20, 0))
        engine.step()
        (second,) = run(engine, ((*STEMS[0], 0, 0), 20, 0))
        engine.step()
        assert second.num_cached_tokens == 8
        shared = set(first.tables[0].kept) & set(second.tables[0].kept)
        assert (engine.kv.num_copied_blocks, len(shared)) == ((2, 0) if contiguous else (0, 2))
        engine.drain(100)
        assert [engine.outputs[n] for n in "12"] == [paper.expected(first), paper.expected(second)]


def test_salts_and_bypass_keep_prefixes_apart() -> None:
    engine = make(64, chunk=64)
    one = engine.sequence(STEMS[0], 4, 0, "a")
    engine.add(one)
    engine.drain(50)
    others = [engine.sequence(STEMS[0], 4, 0, *rest) for rest in (("b", False), ("a", True), ("a", False))]
    for other in others:
        engine.add(other)
    engine.step()
    assert [s.num_cached_tokens for s in others] == [0, 0, 8]
    engine.drain(50)


def test_a_window_gives_back_what_it_has_passed() -> None:
    group = KVGroup(layers=(0,), window=6, num_blocks=most_blocks(6, 100, 8, 4))
    engine = paper.PaperEngine([group], 4, max_batch=1, chunk=8, depth=0, contiguous=True)
    (long,) = run(engine, ((1, 2) * 30, 40, 0))
    held = []
    while engine.live:
        engine.step()
        held.append(engine.kv.pools[0].num_used)
    assert max(held) <= group.num_blocks == 5
    assert engine.outputs["1"] == paper.expected(long)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prefix_behind_a_window_is_found_whenever_results_are_read(depth: int) -> None:
    """A window slides over what has been settled, so that its blocks are published before they are given back."""
    group = KVGroup(layers=(0,), window=6, num_blocks=40)
    engine = paper.PaperEngine([group], 4, max_batch=2, chunk=16, depth=depth, contiguous=True)
    prompt = (1, 2, 0) * 8
    run(engine, (prompt, 2, 0))
    engine.drain(50)
    (second,) = run(engine, ((*prompt, 1, 1), 2, 0))
    engine.drain(50)
    assert second.num_cached_tokens == 24
