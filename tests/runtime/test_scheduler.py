"""The scheduler under random histories: budgets kept, nobody starved, nothing leaked."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.blocks import BlockPool
from pressd.runtime.request import Request
from pressd.runtime.scheduler import Scheduler
from pressd.runtime.sequence import Sequence

BLOCK_SIZE, NUM_BLOCKS = 4, 20


def sequence(name: str, prompt: int, output: int) -> Sequence:
    request = Request(request_id=name, prompt_token_ids=(1,) * prompt)
    return Sequence(request=request, max_length=prompt + output, token_ids=[1] * prompt)


events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 30)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(history=events, max_batch=st.integers(1, 5), slack=st.integers(0, 20))
def test_random_histories(history: list[tuple[str, int, int]], max_batch: int, slack: int) -> None:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_batch=max_batch, max_step_tokens=max_batch + slack)
    live: list[Sequence] = []

    def step() -> None:
        work = scheduler.schedule(now=1.0)
        assert bool(work) == bool(live), "work is handed out whenever there is any"
        assert sum(item.num_tokens for item in work) <= max_batch + slack
        assert len({id(item.sequence) for item in work}) == len(work) <= max_batch
        assert len(work) == scheduler.num_running or sum(i.num_tokens for i in work) == max_batch + slack
        decoding = [s for s in live if s.block_table and s.num_pending_tokens == 1]
        assert all(any(item.sequence is s for item in work) for s in decoding), "a decoding sequence never waits"
        running = [bool(s.block_table) for s in live]
        assert running == sorted(running, reverse=True), "admission is in order of arrival"
        held = [block for s in live for block in s.block_table]
        assert len(held) == len(set(held)) == pool.num_used
        for item in work:
            s = item.sequence
            end = item.reaches_end
            s.num_computed_tokens += item.num_tokens
            assert s.num_computed_tokens <= len(s.token_ids)
            assert s.num_computed_tokens <= len(s.block_table) * BLOCK_SIZE
            if end:
                s.token_ids.append(1)
                if len(s.token_ids) == s.max_length:
                    scheduler.remove(s)
                    live.remove(s)

    for number, (kind, first, second) in enumerate(history):
        if kind == "add":
            new = sequence(f"{number:03}", first, second)
            if scheduler.blocks_needed(new) <= NUM_BLOCKS:
                scheduler.add(new)
                live.append(new)
        elif kind == "abort" and live:
            victim = live.pop(first % len(live))
            scheduler.remove(victim)
        elif kind == "step":
            step()
    for _ in range(5000):
        if not live:
            break
        step()
    assert not live, "every request ends"
    assert pool.num_used == 0
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_a_long_prompt_does_not_stall_decoding() -> None:
    pool = BlockPool(64, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_batch=4, max_step_tokens=8)
    long, short = sequence("long", 100, 4), sequence("short", 1, 4)
    scheduler.add(long)
    scheduler.add(short)
    first = scheduler.schedule(now=0.0)
    # `short` has one pending token (its whole prompt), so it is served before the long prompt's chunk.
    assert [(item.sequence.request.request_id, item.num_tokens) for item in first] == [("short", 1), ("long", 7)]
