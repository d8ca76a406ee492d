"""Layers of one model that differ in their windows: which kernel each gets, and what is reported of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.attention import cpu, reference
from pressd.runtime.kernels.attention.batch import AttentionProblem
from pressd.runtime.kernels.registry import AttentionKernel, Device
from pressd.runtime.models import Decoder, load_decoder, loading
from pressd.runtime.report import KernelChoice

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path: Path = tmp_path_factory.mktemp("models") / "qwen3"
    config = Qwen3Config(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=KINDS,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return Checkpoint.open(path)


def load(checkpoint: Checkpoint) -> Decoder:
    return load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


def attention_choices(decoder: Decoder) -> list[KernelChoice]:
    return [choice for choice in decoder.kernels if choice.op == "attention"]


def test_a_kernel_that_takes_every_window_is_one_choice(checkpoint: Checkpoint) -> None:
    decoder = load(checkpoint)
    assert [block.attention.problem.window for block in decoder.blocks] == [5, None, 5]
    (choice,) = attention_choices(decoder)
    assert (choice.op, choice.storage, choice.implementation, choice.layers) == ("attention", "paged", "cpu", 3)


def test_layers_that_a_kernel_refuses_are_counted_apart(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(checkpoint).full_logits(torch.arange(20)[None])

    def refuse_windows(problem: AttentionProblem, device: Device) -> str | None:
        return None if problem.window is None else "has no window"

    without: AttentionKernel = replace(cpu.KERNEL, name="full only", why_not=refuse_windows)
    monkeypatch.setattr(loading, "attention_kernels", lambda device: (without, reference.KERNEL))
    decoder = load(checkpoint)
    assert [block.attention.kernel.name for block in decoder.blocks] == ["reference", "full only", "reference"]
    assert attention_choices(decoder) == [
        KernelChoice(op="attention", storage="paged", implementation="full only", layers=1),
        KernelChoice(
            op="attention",
            storage="paged",
            implementation="reference",
            layers=2,
            refusals=("full only: has no window",),
        ),
    ]
    torch.testing.assert_close(decoder.full_logits(torch.arange(20)[None]), expected)


def test_the_memory_of_weights_is_all_that_is_held(checkpoint: Checkpoint) -> None:
    """As on disk, but for the gains of queries and keys: stored once for all heads, held once per head."""
    heads, kv_heads, head_dim, layers = 4, 2, 8, len(KINDS)
    held_more = layers * (heads + kv_heads - 2) * head_dim * 4
    assert load(checkpoint).weights_bytes == checkpoint.dense_bytes + held_more
