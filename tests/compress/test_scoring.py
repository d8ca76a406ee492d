"""Log-likelihoods and answers of single texts, against transformers and a search for stops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.compress import scoring
from pressd.compress.forwards import load
from pressd.compress.scoring import answer, score
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder

# What the tiny model's tokenizer spells, without its end of text.
LETTERS = ["<eos>", *map(chr, range(33, 129))]


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return load(Checkpoint.open(tiny_llama))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def texts() -> list[tuple[list[int], list[int]]]:
    made = torch.Generator().manual_seed(3)
    lengths = [(1, 1), (7, 3), (30, 1), (1, 40), (12, 12), (5, 2), (300, 9)]
    return [
        tuple(torch.randint(97, (length,), generator=made).tolist() for length in pair)  # type: ignore[misc]
        for pair in lengths
    ]


@pytest.mark.parametrize("batch_tokens", [4096, 40])
@torch.inference_mode()
def test_scores_are_transformers(
    decoder: Decoder, model: Any, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 97 * 4)
    for (context, continuation), found in zip(texts(), score(decoder, texts()), strict=True):
        ids = torch.tensor([[*context, *continuation][-257:]])
        log_p = torch.log_softmax(model(ids[:, :-1]).logits[0, -len(continuation) :].double(), -1)
        targets = ids[0, -len(continuation) :]
        # Logits agree to 1e-4 of about 20, so each log-probability to 4e-3 at the very worst.
        expected = float(log_p.gather(-1, targets[:, None]).sum())
        assert found.log_likelihood == pytest.approx(expected, abs=4e-3 * len(continuation))
        assert found.is_greedy == bool((log_p.argmax(-1) == targets).all())


@torch.inference_mode()
def test_what_greedy_decoding_says_is_greedy(decoder: Decoder, model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    said = ids[0, 3:].tolist()
    other = [*said[:-1], (said[-1] + 1) % 97]
    found = score(decoder, [([5, 6, 7], said), ([5, 6, 7], other), ([5, 6, 7], said[:1])])
    assert [one.is_greedy for one in found] == [True, False, True]


@torch.inference_mode()
def test_an_answer_ends_at_the_first_stop(decoder: Decoder) -> None:
    def decode(ids: list[int]) -> str:
        return "".join(LETTERS[token] for token in ids)

    whole = answer(decoder, [5, 6, 7], 12, decode, [])
    assert len(whole) == 12
    assert "<eos>" not in whole
    stop = whole[5:7]
    assert answer(decoder, [5, 6, 7], 12, decode, ["", "\0", stop]) == whole[: whole.index(stop)]
    assert answer(decoder, [5, 6, 7], 4, decode, [stop]) == whole[:4]
    long = [index % 97 for index in range(1, 400)]
    assert answer(decoder, long, 12, decode, []) == answer(decoder, long[-244:], 12, decode, [])
    with pytest.raises(ValueError, match="an answer of 256 tokens does not fit a context of 256"):
        answer(decoder, [5], 256, decode, [])


@torch.inference_mode()
def test_an_end_of_text_ends_an_answer(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "greedy", lambda *_: iter(torch.tensor([[4], [5], [0], [6]])))
    assert answer(decoder, [5], 4, lambda ids: "".join(LETTERS[token] for token in ids), []) == LETTERS[4] + LETTERS[5]
