"""Greedy continuations and where two of them part, against transformers' generate and a search token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pressd.compress import compress, divergence
from pressd.compress.convert import convert_to_dense
from pressd.compress.evaluate import evaluate
from pressd.compress.forwards import load
from pressd.compress.greedy import greedy
from pressd.compress.protocol import SEQ_LEN
from pressd.compress.token_rows import read_rows
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return load(Checkpoint.open(tiny_llama))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + index * index % 90) for index in range(400)))
    return str(path)


def prompts(num: int, length: int) -> torch.Tensor:
    return torch.randint(97, (num, length), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def generated(path: Path, prompts_NT: torch.Tensor, most: int) -> torch.Tensor:
    """What transformers says in float32; eos ends nothing."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = prompts_NT
    for _ in range(most):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts_NT.size(1) :]


@pytest.mark.parametrize(("num", "length"), [(1, 1), (3, 17), (5, 8)])
@torch.inference_mode()
def test_greedy_says_what_transformers_says(decoder: Decoder, tiny_llama: Path, num: int, length: int) -> None:
    asked = prompts(num, length)
    # Logits of this model spread over nats and agree to 1e-4: among 20 tokens of 9 prompts none is that close to a tie.
    found = torch.stack(list(greedy(decoder, asked, 20)), dim=1)
    assert found.tolist() == generated(tiny_llama, asked, 20).tolist()


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=2, max_size=2))
def test_first_difference_is_what_a_search_finds(rows: list[list[int]]) -> None:
    ours, theirs = (torch.tensor([row]) for row in rows)
    expected = next((index for index in range(4) if rows[0][index] != rows[1][index]), 4)
    assert divergence.first_differences(ours, theirs).tolist() == [expected]


def test_divergence_is_that_of_two_greedy_runs(
    tiny_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other model is an artifact decoded to float32, which transformers runs as well."""
    monkeypatch.setattr(divergence, "PROMPTS", 4)
    monkeypatch.setattr(divergence, "PROMPT_TOKENS", 16)
    compress(tiny_llama, "w4a16g32", tmp_path / "w4")
    convert_to_dense(tmp_path / "w4", tmp_path / "dense", dtype=torch.float32)
    found = evaluate(tmp_path / "w4", tiny_llama, data=text, tokens=320, seq_len=40, diverge=True)["divergence"]
    asked = read_rows(text, Checkpoint.open(tiny_llama), tokens=320, seq_len=40).ids[[0, 2, 4, 6], :16]
    ours, theirs = (generated(path, asked, 64).tolist() for path in (tmp_path / "dense", tiny_llama))
    first = [
        next((index for index in range(64) if mine[index] != other[index]), 64)
        for mine, other in zip(ours, theirs, strict=True)
    ]
    assert min(first) < 64, "a case without a difference proves nothing"
    values = torch.tensor(first, dtype=torch.float64)
    assert found == {
        "prompts": 4,
        "prompt_tokens": 16,
        "new_tokens": 64,
        "mean": float(values.mean()),
        "median": sum(sorted(first)[1:3]) / 2,
        "never": first.count(64),
        "stderr": {"mean": pytest.approx(float(values.std()) / 2)},
    }


def test_a_model_never_leaves_itself(tiny_llama_tied: Path, text: str) -> None:
    found: Any = evaluate(tiny_llama_tied, tiny_llama_tied, data=text, tokens=64, seq_len=32, diverge=True)
    assert (found["divergence"]["mean"], found["divergence"]["never"], found["divergence"]["prompts"]) == (64.0, 2, 2)
    assert found["divergence"]["stderr"] == {"mean": 0.0}


def test_prompts_lie_over_the_whole_text() -> None:
    rows = torch.arange(100)[:, None].expand(100, SEQ_LEN)
    chosen = divergence.choose_prompts(rows)
    assert chosen.shape == (32, 64)
    assert chosen[:, 0].tolist() == [index * 100 // 32 for index in range(32)]
    assert divergence.choose_prompts(rows[:5, :9])[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_context_too_short_for_continuations_is_refused(
    tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "NEW_TOKENS", 250)
    with pytest.raises(ValueError, match="reads 256 tokens at once; a prompt with its continuation is 290"):
        evaluate(tiny_llama, tiny_llama, data=text, tokens=80, seq_len=40, diverge=True)
