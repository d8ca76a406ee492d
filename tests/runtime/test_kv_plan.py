"""How KV memory is divided among layers that keep everything and layers that keep a window."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kv_cache import most_blocks
from pressd.runtime.kv_plan import longest_sequence, plan_groups

LAYER_BYTES = 1000


@given(
    windows=st.lists(st.sampled_from([None, 5, 64]), min_size=1, max_size=6),
    memory=st.integers(0, 2_000_000),
    block_size=st.integers(1, 32),
    max_context=st.integers(1, 600),
    max_batch=st.integers(1, 20),
    chunk=st.integers(20, 100),
    bounded=st.booleans(),
)
def test_every_layer_is_in_one_group_and_memory_is_kept(
    windows: list[int | None],
    memory: int,
    block_size: int,
    max_context: int,
    max_batch: int,
    chunk: int,
    bounded: bool,
) -> None:
    sizes = {"block_size": block_size, "max_context": max_context, "chunk": chunk}
    try:
        groups = plan_groups(
            windows, layer_block_bytes=LAYER_BYTES, memory=memory, max_batch=max_batch, bounded=bounded, **sizes
        )
    except ArtifactError:
        groups = ()
    if not groups:
        assert memory < 2 * sum(LAYER_BYTES * most_blocks(w, max_context, chunk, block_size) for w in windows)
        return
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    for group in groups:
        assert {windows[layer] for layer in group.layers} == {group.window}
        assert group.num_blocks >= 1
        if bounded:
            assert group.num_blocks <= max_batch * most_blocks(group.window, max_context, chunk, block_size)
    assert sum(LAYER_BYTES * len(group.layers) * group.num_blocks for group in groups) <= memory
    longest = longest_sequence(groups, **sizes)
    assert 1 <= longest <= max_context
    for group in groups:
        assert most_blocks(group.window, longest, chunk, block_size) <= group.num_blocks
    if longest < max_context:
        # The next block would be one too many somewhere.
        assert any(
            most_blocks(group.window, longest + block_size, chunk, block_size) > group.num_blocks for group in groups
        )


def test_the_memory_is_what_was_planned(tiny_llama: Path) -> None:
    """Both as given and as taken: 2 layers x 2 (K and V) x 2 heads x 16 x 4 bytes x 16 tokens = 8 KiB a block."""
    for memory, blocks in ((100 * 8192, 100), (100 * 8192 + 8191, 100), (8192, 1)):
        engine = Engine.from_pretrained(tiny_llama, EngineConfig(dtype="float32", kv_memory=memory))
        held = [tensor for layer in engine._runner.kv for tensor in (layer.keys, layer.values)]
        assert engine.info.kv_blocks == blocks
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == engine.info.kv_bytes == blocks * 8192
    unbounded = Engine.from_pretrained(tiny_llama, EngineConfig(dtype="float32", max_batch=3))
    assert unbounded.info.kv_blocks == 3 * 256 // 16, "no more than the batch can ever use"


def test_too_little_memory_is_refused_in_words() -> None:
    with pytest.raises(ArtifactError, match=r"5 bytes holds no block of 16 tokens in every layer \(3000 bytes\)"):
        plan_groups(
            [None, None, 7],
            layer_block_bytes=1000,
            memory=5,
            block_size=16,
            max_context=64,
            max_batch=1,
            chunk=8,
            bounded=False,
        )
