"""Ten thousand requests through one engine, drawn by tests/bench/soak.py: nothing is kept."""

import importlib.util
import random
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType

import pytest

from pressd.runtime.engine import Engine

# Pools and caches are full after 2,000 requests. If one object were kept of each of the 8,000 that follow, it would be
# its Request at least: 1 KiB with its settings and its prompt. Half of that, for what the allocator does.
BOUND = 8000 * 512
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_soak", BENCH / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_soak", module)
    spec.loader.exec_module(module)
    return module


def test_a_few_hundred_requests_leave_no_block(tiny_llama: Path, bench: ModuleType) -> None:
    engine = Engine.from_pretrained(tiny_llama, bench.CONFIG)
    bench.soak(engine, 300, seed=1, tell=lambda ended, size: None)
    stats = engine.stats()
    # The mixture reaches what it is there for.
    assert stats.prefix_hit_tokens > 0
    assert not engine.has_work


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_memory(tiny_llama: Path, bench: ModuleType) -> None:
    engine = Engine.from_pretrained(tiny_llama, bench.CONFIG)
    sizes: dict[int, int] = {}
    bench.soak(engine, 10000, seed=2, tell=lambda ended, size: sizes.update({ended // 1000: size}))
    assert list(sizes) == list(range(1, 11))
    assert sizes[10] - sizes[2] < BOUND


def test_requests_that_were_kept_would_show(bench: ModuleType) -> None:
    """Counted by the interpreter: in a process that has freed memory before, resident memory need not grow for them."""
    rng = random.Random(3)
    beginnings = [tuple(rng.randrange(97) for _ in range(20)) for _ in range(20)]
    tracemalloc.start()
    try:
        kept = [bench.draw_request(number, 97, beginnings, rng) for number in range(8000)]
        assert tracemalloc.get_traced_memory()[0] > BOUND
    finally:
        tracemalloc.stop()
    assert len(kept) == 8000
