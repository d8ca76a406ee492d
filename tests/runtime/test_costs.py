"""How many tokens a step may have: the table of costs, and the budget that holds a step to its time."""

import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pressd.runtime.config import EngineConfig
from pressd.runtime.costs import FACTOR_BOUNDS, CostTable, TimeBudget, TokenBudget
from pressd.runtime.engine import Engine
from pressd.runtime.params import StoppingParams
from pressd.runtime.request import Request

TABLE = CostTable((1, 4, 16, 64), (0.010, 0.012, 0.018, 0.066))

tables = st.lists(st.tuples(st.integers(1, 50), st.floats(1e-4, 1.0)), min_size=1, max_size=6).map(
    lambda steps: CostTable(
        tuple(sum(width for width, _ in steps[: place + 1]) for place in range(len(steps))),
        tuple(seconds for _, seconds in steps),
    )
)


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert TABLE.predict(1) == 0.010
    assert TABLE.predict(10) == pytest.approx(0.015)
    assert TABLE.predict(64) == pytest.approx(0.066)
    assert TABLE.predict(128) == pytest.approx(0.066 + 64 * 0.001)
    assert CostTable((8,), (0.5,)).predict(16) == pytest.approx(1.0), "one measurement: in proportion"


@example(table=CostTable((1, 2, 3), (0.3082732980001283, 0.8273809765859631, 0.5)), seconds=0.0, most=3)
@given(table=tables, seconds=st.floats(0.0, 3.0), most=st.integers(0, 400))
def test_tokens_within_a_time_are_the_most_that_fit(table: CostTable, seconds: float, most: int) -> None:
    costs = [table.predict(number) for number in range(1, most + 1)]
    assert costs == sorted(costs), "more tokens never cost less"
    assert table.tokens_within(seconds, most) == sum(cost <= seconds for cost in costs)


def test_a_budget_follows_what_steps_take() -> None:
    """On a machine that is three times as slow as when it was measured, a third of the time's tokens are planned."""
    rng = random.Random(1)
    budget = TimeBudget(TABLE, 0.060, max_step_tokens=512, floor=8)
    assert budget.tokens(num_decoding=2) == TABLE.tokens_within(0.060, 512) == 58
    for _ in range(200):
        planned = budget.tokens(2)
        budget.observe(planned, 3 * TABLE.predict(planned) * rng.uniform(0.9, 1.1))
    assert budget.factor == pytest.approx(3, rel=0.1)
    assert budget.tokens(2) == TABLE.tokens_within(0.060 / budget.factor, 512)
    for _ in range(1000):
        budget.observe(16, 100.0)
    assert budget.factor == FACTOR_BOUNDS[1], "a stall of the machine does not end all prefill"


def test_prompts_come_on_however_many_decode() -> None:
    budget = TimeBudget(TABLE, 0.001, max_step_tokens=64, floor=8)
    assert budget.tokens(num_decoding=0) == 64, "nobody waits for a token"
    assert budget.tokens(num_decoding=30) == 38
    assert budget.tokens(num_decoding=60) == 64
    assert TokenBudget(64).tokens(3) == 64


def test_a_target_cuts_prompts_smaller_while_others_decode(tiny_llama: Path) -> None:
    """The table is of this machine: a tiny target leaves the floor, a huge one everything, whatever it measures."""
    sizes = {}
    for target in (1e-6, 1000.0):
        settings = EngineConfig(dtype="float32", block_size=4, max_batch=2, max_step_tokens=64, target_itl=target)
        engine = Engine.from_pretrained(tiny_llama, settings)
        engine.add(Request(request_id="a", prompt_token_ids=(1,), stopping=StoppingParams(ignore_eos=True)))
        engine.step()
        engine.add(Request(request_id="b", prompt_token_ids=(2,) * 40))
        sizes[target] = engine.step().stats.num_prefill_tokens
    assert sizes == {1e-6: 4, 1000.0: 40}
