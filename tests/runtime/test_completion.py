"""Whole completions and streams in one process: transformers' text, alone or beside others, and nothing left behind."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import pressd.runtime
from pressd.runtime import (
    Completion,
    Constraint,
    Engine,
    EngineConfig,
    FinishReason,
    Piece,
    RequestError,
    SamplingParams,
    StoppingParams,
)
from pressd.runtime.request import Request

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
EXACT = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=3, max_step_tokens=11)
PROMPTS = [
    "if __name__ == '__main__':\n",
    "def main():\n",
    "import ",
    "class Node:\n    def __init__(self",
    "# Copyright",
    "ü 漢字 €",
]
DRAWN = SamplingParams(temperature=1.3, seed=5)
# So hot that tokens are nearly uniform: many are bytes that belong to no character.
NOISE = SamplingParams(temperature=50.0, seed=9, n=3)
SHORT = StoppingParams(max_new_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def pylm() -> Engine:
    return Engine.from_pretrained(PYLM, EngineConfig(dtype="float32", max_batch=3, kv_memory=1 << 24))


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[Engine]:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    yield engine
    assert_idle(engine)


def assert_idle(engine: Engine) -> None:
    engine.check_integrity()
    assert not engine.has_work
    assert not engine.live_request_ids
    assert engine.stats().kv_blocks_used == 0


def joined(pieces: list[Piece], like: Completion) -> Completion:
    """One sequence's pieces as the completion that they make up."""
    own = [piece for piece in pieces if piece.index == like.index]
    assert [piece.finish_reason is None for piece in own] == [True] * (len(own) - 1) + [False]
    reason = own[-1].finish_reason
    assert reason is not None
    return Completion(
        index=like.index,
        prompt_token_ids=like.prompt_token_ids,
        token_ids=tuple(token for piece in own for token in piece.token_ids),
        text=None if own[0].text is None else "".join(piece.text or "" for piece in own),
        finish_reason=reason,
        error=own[-1].error,
        logprobs=tuple(entry for piece in own for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in own for entry in piece.prompt_logprobs),
    )


def test_greedy_text_is_that_of_transformers(pylm: Engine) -> None:
    """Both in float32; more prompts than the batch holds, so that some wait. Some end by themselves."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.float32), AutoTokenizer.from_pretrained(PYLM)
    ours = pylm.generate(PROMPTS, stopping=StoppingParams(max_new_tokens=60))
    assert {completion.finish_reason for completion in ours} == {FinishReason.EOS, FinishReason.MAX_TOKENS}
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, pad_token_id=0
            )
        assert completion.prompt_token_ids == tuple(ids[0].tolist())
        assert completion.text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert (completion.index, completion.error, completion.logprobs) == (0, None, ())
    assert_idle(pylm)


def test_one_text_and_its_ids_are_the_same_prompt(engine: Engine) -> None:
    (of_text,) = engine.generate("lo", stopping=SHORT)
    (of_ids,) = engine.generate([torch.tensor(of_text.prompt_token_ids)], stopping=SHORT)
    assert of_text == of_ids
    assert engine.generate([]) == []


def test_each_prompt_has_its_n_sequences_in_order(engine: Engine) -> None:
    drawn = SamplingParams(temperature=1.3, seed=5, n=3)
    together = engine.generate(["lo", "and behold"], drawn, SHORT)
    assert [completion.index for completion in together] == [0, 1, 2, 0, 1, 2]
    assert together[:3] == engine.generate("lo", drawn, SHORT)
    assert together[3:] == engine.generate("and behold", drawn, SHORT)
    assert len({completion.token_ids for completion in together}) == 6
    # The first sequence of several has the noise that it has alone; another seed has other noise.
    assert [together[0]] == engine.generate("lo", DRAWN, SHORT)
    assert [together[0]] != engine.generate("lo", SamplingParams(temperature=1.3, seed=6), SHORT)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_is_the_completion_in_pieces(tiny_llama: Path, overlap: bool) -> None:
    config = EngineConfig(dtype="float64", kernels="reference", max_batch=3, max_step_tokens=4, overlap=overlap)
    engine = Engine.from_pretrained(tiny_llama, config)
    scored = SamplingParams(temperature=1.3, seed=5, n=3, logprobs=True, top_logprobs=2, prompt_logprobs=True)
    whole = engine.generate("lo and behold", scored, SHORT)
    pieces = list(engine.stream("lo and behold", scored, SHORT))
    assert [joined(pieces, like=completion) for completion in whole] == whole
    assert all(len(c.logprobs) == len(c.token_ids) for c in whole)
    assert len(whole[0].prompt_logprobs) == len(whole[0].prompt_token_ids) - 1
    assert_idle(engine)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_character_is_torn(pylm: Engine, prompt: str) -> None:
    stopping = StoppingParams(max_new_tokens=40, ignore_eos=True)
    whole = pylm.generate(prompt, NOISE, stopping)
    pieces = list(pylm.stream(prompt, NOISE, stopping))
    assert [joined(pieces, like=completion) for completion in whole] == whole
    tokenizer = AutoTokenizer.from_pretrained(PYLM)
    for completion in whole:
        expected = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text == expected
        # What cannot be a character yet is held back, so a piece ends with the mark for it only at the very end.
        texts = [piece.text for piece in pieces if piece.index == completion.index]
        assert not any(text.endswith("\ufffd") for text in texts[:-1])
        assert sum(bool(text) for text in texts) > 10


@pytest.mark.parametrize("overlap", [False, True])
def test_leaving_a_stream_frees_its_blocks(tiny_llama: Path, overlap: bool) -> None:
    config = EngineConfig(dtype="float64", kernels="reference", block_size=4, overlap=overlap)
    engine = Engine.from_pretrained(tiny_llama, config)
    expected = list(engine.stream("lo and behold", DRAWN, SHORT))
    for piece in engine.stream("lo and behold", DRAWN, SHORT):
        assert piece == expected[0]
        assert engine.stats().kv_blocks_used > 0
        break
    assert_idle(engine)
    never_begun = engine.stream("lo", DRAWN, SHORT)
    assert_idle(engine)
    assert [piece.index for piece in never_begun] == [0] * 9
    assert_idle(engine)


def test_calls_may_overlap(engine: Engine) -> None:
    alone = [list(engine.stream(prompt, DRAWN, SHORT)) for prompt in ("lo", "behold")]
    whole = engine.generate("and", DRAWN, SHORT)
    first, second = (engine.stream(prompt, DRAWN, SHORT) for prompt in ("lo", "behold"))
    taken: tuple[list[Piece], list[Piece]] = ([], [])
    for one, other in itertools.zip_longest(first, second):
        taken[0].append(one)
        taken[1].append(other)
        if len(taken[0]) == 4:
            assert engine.generate("and", DRAWN, SHORT) == whole
    assert list(taken) == alone


def test_stop_on_eos_and_on_a_token(engine: Engine) -> None:
    (free,) = engine.generate("lo", stopping=SHORT)
    assert free.finish_reason is FinishReason.MAX_TOKENS
    stop = free.token_ids[4]
    (stopped,) = engine.generate("lo", stopping=StoppingParams(max_new_tokens=9, stop_token_ids=(stop,)))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]
    # The tiny model's EOS has id 0, and these draws would go on to the limit of 200 without it.
    drawn = SamplingParams(temperature=2.0, n=3)
    long, unlimited = StoppingParams(max_new_tokens=200), StoppingParams(max_new_tokens=200, ignore_eos=True)
    for ended, through in zip(engine.generate("lo", drawn, long), engine.generate("lo", drawn, unlimited), strict=True):
        assert ended.finish_reason is FinishReason.EOS
        assert ended.token_ids == through.token_ids[: through.token_ids.index(0)]
        assert ended.text is not None
        assert through.text is not None
        assert through.text.startswith(ended.text)  # also where a special token follows, which adds no text


def test_a_bad_prompt_leaves_nothing_queued(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"^prompts\[1\]: prompt: token id 97 is outside the vocabulary of 97$"):
        engine.generate([[1, 2], [3, 97], [4]], stopping=SHORT)
    assert_idle(engine)
    with pytest.raises(RequestError, match="has 256 tokens; the context of 256 leaves no room"):
        engine.stream([1] * 256)
    with pytest.raises(RequestError, match=r"write \[\[1, 2\]\] for one prompt of ids"):
        engine.generate([1, 2])
    with pytest.raises(TypeError):
        engine.generate([[1.5]])


def test_one_bad_request_does_not_lose_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    """The embedding of one token is broken, so that prompts with it have no logits."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][50] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    sound, engine = Engine.from_pretrained(tiny_llama, EXACT), Engine.from_pretrained(broken, EXACT)
    never = SamplingParams(temperature=0.0, logit_bias=((50, -100.0),))
    good, bad, last = engine.generate([[5, 6], [5, 50], [7]], never, SHORT)
    assert [good, last] == sound.generate([[5, 6], [7]], never, SHORT)
    assert (bad.finish_reason, bad.token_ids) == (FinishReason.NUMERIC_ERROR, ())
    assert bad.error == "the model's logits are not finite numbers"
    (piece,) = engine.stream([5, 50], never, SHORT)
    assert (piece.finish_reason, piece.error) == (FinishReason.NUMERIC_ERROR, bad.error)
    assert_idle(engine)


def test_constraints_hold_and_bad_ones_say_why(engine: Engine) -> None:
    choice = Constraint(kind="choice", choices=("yes", "no way"))
    (chosen,) = engine.generate("lo", constraint=choice)
    assert chosen.text in choice.choices
    assert chosen.finish_reason in (FinishReason.CONSTRAINT_COMPLETE, FinishReason.EOS)
    assert "".join(piece.text or "" for piece in engine.stream("lo", constraint=choice)) == chosen.text
    (refused,) = engine.generate("lo", constraint=Constraint(kind="regex", text="("))
    assert (refused.finish_reason, refused.token_ids, refused.text) == (FinishReason.CONSTRAINT_INVALID, (), "")
    assert refused.error is not None
    assert "regex" in refused.error


def test_requests_of_others_are_refused_and_lose_nothing(engine: Engine) -> None:
    (expected,) = engine.generate([[5, 6]], stopping=SHORT)
    engine.add(
        Request(request_id="theirs", prompt_token_ids=(5, 6), sampling=SamplingParams(temperature=0.0), stopping=SHORT)
    )
    with pytest.raises(RuntimeError, match=r"the request 'theirs' was queued by add\(\)"):
        engine.generate("lo", stopping=SHORT)
    with pytest.raises(RuntimeError, match="'theirs'"):
        next(engine.stream("lo", stopping=SHORT))
    tokens = [token for _ in range(9) for output in engine.step().outputs for token in output.token_ids]
    assert tuple(tokens) == expected.token_ids
    stream = engine.stream("lo", stopping=SHORT)
    next(stream)
    engine.step()
    with pytest.raises(RuntimeError, match=r"step\(\) was called while a stream was open"):
        next(stream)
    stream = engine.stream("lo", stopping=SHORT)
    next(stream)
    for request_id in list(engine.live_request_ids):
        engine.abort(request_id)
    with pytest.raises(RuntimeError, match="aborted by somebody else"):
        next(stream)


def test_without_a_tokenizer_there_are_ids(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    engine, whole = Engine.from_pretrained(bare, EXACT), Engine.from_pretrained(tiny_llama, EXACT)
    (completion,) = engine.generate([[5, 6]], stopping=SHORT)
    assert completion.text is None
    assert completion.token_ids == whole.generate([[5, 6]], stopping=SHORT)[0].token_ids
    assert [piece.text for piece in engine.stream([5, 6], stopping=SHORT)] == [None] * 9
    with pytest.raises(RequestError, match=r"^prompt: is a text, and this model has no tokenizer; give token ids$"):
        engine.generate("lo")
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        Engine.from_pretrained(bare, EXACT).generate("lo")


def test_what_users_need_is_exported_and_loads_no_torch() -> None:
    for name in pressd.runtime.__all__:
        assert getattr(pressd.runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Gone'"):
        _ = pressd.runtime.Gone  # type: ignore[attr-defined]
    light = ", ".join(set(pressd.runtime.__all__) - {"Engine"})
    program = f"import sys; from pressd.runtime import {light}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
