"""From what a client asked to what the engine is told; from a model's files to its defaults."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pressd.runtime.params import SamplingParams
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import Request
from pressd.server.admission import Admission
from pressd.server.asked import Asked, TokenPrompt, engine_request
from pressd.server.errors import Refusal
from pressd.server.model_card import DEFAULT_MAX_NEW_TOKENS, ModelCard, read_card

INFO = EngineInfo(
    architecture="A",
    artifact_id="a",
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    vocab_size=10,
    max_context=100,
    max_batch=4,
    eos_token_ids=(0,),
    block_size=16,
    kv_blocks=100,
    kv_tokens=1600,
    kv_bytes=1,
    weights_bytes=1,
    dense_bytes=1,
    kernels=(),
    unfused_groups=0,
    load_seconds={},
)
CARD = ModelCard(
    sampling=SamplingParams(temperature=0.5, top_p=0.25), max_new_tokens=40, manifest=None, schemes=(), not_applied=()
)


def told(num_prompt: int = 3, info: EngineInfo = INFO, **options: int | float) -> Request:
    own = {name: options.pop(name) for name in ("max_new_tokens", "min_new_tokens") if name in options}
    prompt = TokenPrompt((1,) * num_prompt)
    asked = Asked(request_id="r", model="", prompt=prompt, sampling=options, **own)  # type: ignore[arg-type]
    return engine_request(asked, (1,) * num_prompt, info=info, card=CARD, engine_id="7", arrival=2.0)


def test_what_is_left_unset_is_the_models() -> None:
    request = told()
    assert (request.request_id, request.arrival, request.prompt_token_ids) == ("7", 2.0, (1, 1, 1))
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.25)
    assert told().sampling.seed != told().sampling.seed  # 64 random bits
    assert told(temperature=0.0, seed=0).sampling == SamplingParams(temperature=0.0, top_p=0.25, seed=0)


@pytest.mark.parametrize(
    ("num_prompt", "wanted", "kv_blocks", "expected"),
    [
        (3, None, 100, 40),  # the model's default
        (3, 50, 100, 50),
        (70, None, 100, None),  # 30 to the context limit, which is then what ends it
        (70, 30, 100, None),
        (70, 29, 100, 29),
        (99, None, 100, None),
        # Two blocks hold 32 tokens, and the last of a sequence needs no place.
        (30, None, 2, 3),
        (30, 3, 2, 3),
        (30, 4, 2, "KV_CAPACITY"),
        (40, None, 2, "KV_CAPACITY"),  # not even the prompt
        (100, None, 100, "PROMPT_TOO_LONG"),
    ],
)
def test_length_is_bounded_by_request_model_context_and_pool(
    num_prompt: int, wanted: int | None, kv_blocks: int, expected: int | str | None
) -> None:
    options = {} if wanted is None else {"max_new_tokens": wanted}
    info = replace(INFO, kv_blocks=kv_blocks, kv_tokens=kv_blocks * INFO.block_size)
    if isinstance(expected, str):
        with pytest.raises(Refusal) as caught:
            told(num_prompt, info, **options)
        assert caught.value.reason == expected
    else:
        assert told(num_prompt, info, **options).stopping.max_new_tokens == expected


@pytest.mark.parametrize(
    ("content", "sampling", "max_new_tokens", "not_applied"),
    [
        (None, {}, DEFAULT_MAX_NEW_TOKENS, ()),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 3},
            {},
            DEFAULT_MAX_NEW_TOKENS,
            (),
        ),  # transformers does not sample
        ({"do_sample": True}, {"temperature": 1.0}, DEFAULT_MAX_NEW_TOKENS, ()),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9},
            {"temperature": 0.7, "top_p": 0.9},
            9,
            (),
        ),
        (
            {"do_sample": True, "top_k": 20, "min_p": 0.1, "typical_p": 0.9, "no_repeat_ngram_size": None},
            {"temperature": 1.0, "top_k": 20, "min_p": 0.1, "typical_p": 0.9},
            DEFAULT_MAX_NEW_TOKENS,
            (),
        ),
        ({"repetition_penalty": 1.2, "top_k": 0}, {"repetition_penalty": 1.2}, DEFAULT_MAX_NEW_TOKENS, ()),
        ({"num_beams": 4, "min_p": None}, {}, DEFAULT_MAX_NEW_TOKENS, ("num_beams",)),
    ],
)
def test_defaults_are_those_of_generation_config(
    tmp_path: Path,
    content: dict[str, object] | None,
    sampling: dict[str, float],
    max_new_tokens: int,
    not_applied: tuple[str, ...],
) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    card = read_card(tmp_path)
    assert card.sampling == replace(SamplingParams(temperature=0.0), **sampling)  # type: ignore[arg-type]
    assert (card.max_new_tokens, card.not_applied) == (max_new_tokens, not_applied)
    assert (card.format, card.passes, card.quality) == ("dense", (), {})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "mend it or remove it"),
        ("[]", "must hold a JSON object"),
        ('{"do_sample": true, "top_p": "high"}', "top_p is 'high'; it must be a number"),
        ('{"do_sample": true, "temperature": -1}', "temperature is -1"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0"),
    ],
)
def test_broken_generation_config_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_card(tmp_path)
    assert "generation_config.json" in str(caught.value)


def test_admission_counts_back_whatever_happens() -> None:
    admission = Admission(max_requests=2, max_waiting_tokens=10)
    with admission.enter() as first, admission.enter() as second:
        first.wait_with(8)
        with pytest.raises(Refusal, match="8 prompt tokens are waiting"):
            second.wait_with(3)
        with pytest.raises(Refusal, match="2 requests are inside"), admission.enter():
            pass
        first.begun()
        second.wait_with(11)  # alone, so it may
        assert admission.num_waiting_tokens == 11
    assert (admission.num_requests, admission.num_waiting_tokens) == (0, 0)


def test_several_sequences_count_as_so_many_requests() -> None:
    admission = Admission(max_requests=5, max_waiting_tokens=10)
    with admission.enter(3):
        with pytest.raises(Refusal, match="3 requests are inside"), admission.enter(3):
            pass
        with admission.enter(2):
            assert admission.num_requests == 5
    with pytest.raises(Refusal) as caught, admission.enter(6):
        pass
    assert (caught.value.field, admission.num_requests) == ("sampling.num_sequences", 0)
