"""Forbidden tokens, biases and penalties: against transformers' logits processors and against plain loops."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.sampling import Sampler, TokenMasks

VOCAB = 37
PROMPT, OUTPUT = (5, 9, 9, 30), (5, 7, 7, 7, 12, 9)
GREEDY = {"temperature": 0.0}
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def some_logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def changed(
    logits: torch.Tensor,
    sampling: SamplingParams,
    tokens: Sequence[int] = PROMPT + OUTPUT,
    num_prompt: int = len(PROMPT),
    stopping: StoppingParams | None = None,
    allowed: TokenMasks | None = None,
) -> torch.Tensor:
    """Logits [V] after all that a request changes, as the draw sees them."""
    sampler = oracle.sampler_for([oracle.request_for(sampling, tokens[:num_prompt], stopping)], [tokens], len(logits))
    before = logits.clone()
    result = sampler._changed(logits[None], sampler._plan_for([0]), torch.tensor([len(tokens)]), allowed)[0].clone()
    assert torch.equal(logits, before)
    return result


def assert_as(processor: Processor, ours: torch.Tensor, logits: torch.Tensor, tokens: Sequence[int]) -> None:
    theirs = processor(torch.tensor([list(tokens)]), logits[None].clone())[0]
    # One or two roundings of products and quotients of numbers below 100.
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(logits.dtype).eps, atol=0.0)
    assert not torch.equal(ours, logits), "nothing changed, so nothing was compared"


def processors() -> Any:
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [1.3, 0.7, 100.0, 0.01])
def test_repetition_penalty_is_transformers(penalty: float, dtype: torch.dtype) -> None:
    logits = some_logits(dtype=dtype)
    ours = changed(logits, SamplingParams(repetition_penalty=penalty))
    assert_as(processors().RepetitionPenaltyLogitsProcessor(penalty), ours, logits, PROMPT + OUTPUT)
    inverse = changed(logits, SamplingParams(repetition_penalty=1 / penalty))
    with pytest.raises(AssertionError):
        assert_as(processors().RepetitionPenaltyLogitsProcessor(penalty), inverse, logits, PROMPT + OUTPUT)


def test_bias_is_transformers() -> None:
    logits = some_logits()
    ours = changed(logits, SamplingParams(logit_bias=((3, 2.5), (0, -100.0), (36, 0.125))))
    processor = processors().SequenceBiasLogitsProcessor([[[3], 2.5], [[0], -100.0], [[36], 0.125]])
    assert_as(processor, ours, logits, PROMPT + OUTPUT)


WORDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one token": ((4,), (36,)),
    "ends as the sequence does": ((12, 9, 3), (7, 12, 9, 8), (9, 1)),
    "does not": ((12, 8, 3), (9, 12, 3), (30, 2)),
    "reaches into the prompt": ((9, 9, 30, 5, 7, 7, 7, 12, 9, 11),),
    "longer than the sequence": ((1,) * 20, (*PROMPT, *OUTPUT, 2), (6, *PROMPT, *OUTPUT, 3)),
    "the same end twice": ((9, 20), (12, 9, 20), (4, 20), (20,)),
    "many": tuple((a, b) for a in range(16) for b in range(16)),
}


@pytest.mark.parametrize("words", WORDS)
def test_bad_words_are_transformers(words: str) -> None:
    """Over prompt and output. Theirs, unlike ours, leaves out words that are an EOS token alone."""
    logits = some_logits()
    ours = changed(logits, SamplingParams(bad_words=WORDS[words]))
    processor = processors().NoBadWordsLogitsProcessor([list(word) for word in WORDS[words]])
    theirs = processor(torch.tensor([PROMPT + OUTPUT]), logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(ours, logits) == (words == "does not")


def test_bad_words_of_several_rows_do_not_mix() -> None:
    words = [WORDS["one token"], (), WORDS["the same end twice"], WORDS["longer than the sequence"], ((8, 9, 2),)]
    histories = [(1, 2, 3), (5,), (4,), (*PROMPT, *OUTPUT), (8, 9)]
    requests = [
        oracle.request_for(SamplingParams(bad_words=banned), history[:1])
        for banned, history in zip(words, histories, strict=True)
    ]
    sampler = oracle.sampler_for(requests, histories, VOCAB)
    logits = torch.stack([some_logits(seed) for seed in range(5)])
    order = [3, 0, 4, 2, 1]
    positions = torch.tensor([len(histories[row]) for row in order])
    ours = sampler._changed(logits, sampler._plan_for(order), positions, None)
    for place, row in enumerate(order):
        sampling = SamplingParams(bad_words=words[row])
        alone = changed(logits[place], sampling, histories[row], 1) if words[row] else logits[place]
        assert torch.equal(ours[place], alone)


@pytest.mark.parametrize("min_new", [0, 1, len(OUTPUT), len(OUTPUT) + 1, 50])
def test_min_new_tokens_is_transformers(min_new: int) -> None:
    logits, ends = some_logits(), [oracle.EOS, 30]
    stopping = StoppingParams(min_new_tokens=min_new, stop_token_ids=(30, oracle.EOS))
    sampling = SamplingParams(logit_bias=((1, 0.5),))
    ours = changed(logits, sampling, stopping=stopping)
    logits[1] += 0.5
    processor = processors().MinNewTokensLengthLogitsProcessor(len(PROMPT), min_new, torch.tensor(ends))
    theirs = processor(torch.tensor([PROMPT + OUTPUT]), logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (ours[30] == float("-inf")) == (min_new > len(OUTPUT))


def test_ignored_eos_may_be_drawn_before_min_new_tokens() -> None:
    stopping = StoppingParams(min_new_tokens=50, stop_token_ids=(30,), ignore_eos=True)
    forbidden = changed(some_logits(), SamplingParams(), stopping=stopping).isinf()
    assert forbidden.nonzero().flatten().tolist() == [30]


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


@settings(max_examples=80, deadline=None)
@given(
    repetition=st.just(1.0) | numbers(0.01, 100),
    presence=st.just(0.0) | numbers(-100, 100),
    frequency=st.just(0.0) | numbers(-100, 100),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), numbers(-100, 100), max_size=5),
    allowed=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    num_prompt=st.integers(1, 30),
)
def test_all_together_are_what_the_oracle_says(
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    allowed: set[int] | None,
    tokens: list[int],
    num_prompt: int,
) -> None:
    num_prompt = min(num_prompt, len(tokens))
    sampling = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
        allowed_token_ids=None if allowed is None else tuple(allowed),
    )
    logits = some_logits(len(tokens))
    ours = changed(logits, sampling, tokens, num_prompt).numpy()
    theirs = oracle.edited(logits.numpy(), sampling, tokens, num_prompt)
    # A few roundings of numbers of which the largest is below 30 counts * 100 + (100 + 20) * 100.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=8 * 15100 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97, 4099])
def test_token_masks_allow_what_their_bits_say(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    words = -(-vocab_size // 32)
    allowed = generator.random((2, words * 32)) < 0.3  # bits past the vocabulary are set, too
    allowed[:, 0] = True
    packed = np.packbits(allowed, axis=1, bitorder="little").view("<i4")
    masks = TokenMasks([2, 0], torch.from_numpy(packed.copy()))
    requests = [oracle.request_for(SamplingParams(**GREEDY))] * 3
    sampler = oracle.sampler_for(requests, [(0,)] * 3, vocab_size)
    logits = torch.from_numpy(generator.standard_normal((3, vocab_size)))
    drawn = sampler.sample(logits, [0, 1, 2], torch.ones(3, dtype=torch.int64), masks)
    for place, mask in ((2, allowed[0]), (0, allowed[1])):
        masked = np.where(mask[:vocab_size], logits[place].numpy(), -np.inf)
        assert drawn.token_ids[place] == masked.argmax()
    assert drawn.token_ids[1] == logits[1].argmax()


def test_masked_draws_follow_what_is_left() -> None:
    logits = some_logits().float()
    allowed = torch.zeros(2, 32, dtype=torch.int64)
    allowed.view(-1)[[0, 3, 9, 31, 32, 36]] = 1
    bits = (allowed << torch.arange(32)).sum(1).to(torch.int32)
    sampling = SamplingParams(temperature=2.0, top_p=0.9, seed=3)
    counts = oracle.count_draws(logits, sampling, 10000, masks=bits)
    left = np.where(allowed.view(-1)[:VOCAB].numpy() == 1, logits.double().numpy(), -np.inf)
    assert oracle.p_value(counts, oracle.distribution(left, sampling)) > oracle.SIGNIFICANCE


def test_where_nothing_is_left_a_row_is_impossible_and_no_other() -> None:
    stopping = StoppingParams(min_new_tokens=5, stop_token_ids=(2, 3))
    only = SamplingParams(allowed_token_ids=(2, 3))
    requests = [
        oracle.request_for(only, stopping=stopping),
        oracle.request_for(only),
        oracle.request_for(SamplingParams(allowed_token_ids=(7,), bad_words=((7,),), **GREEDY)),
        oracle.request_for(SamplingParams(top_p=0.9, top_k=3)),
        oracle.request_for(SamplingParams(repetition_penalty=1.1)),
    ]
    sampler = oracle.sampler_for(requests, [(1,)] * 5, VOCAB)
    logits = some_logits().float().repeat(5, 1)
    masks = TokenMasks([3], torch.zeros(1, 2, dtype=torch.int32))
    drawn = sampler.sample(logits, list(range(5)), torch.ones(5, dtype=torch.int64), masks)
    assert drawn.possible.tolist() == [False, True, False, False, True]
    assert drawn.finite.all()
    assert drawn.token_ids[1] in (2, 3)
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < VOCAB)).all()
    later = sampler.sample(logits, [0], torch.tensor([6]))
    assert later.possible.all()


def test_what_was_drawn_counts_at_once_and_again_after_a_preemption() -> None:
    """A frequency penalty on greedy draws: step by step, then the sequence admitted anew with its tokens."""
    sampling = SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.2, **GREEDY)
    request = oracle.request_for(sampling, (1, 2))
    table = torch.full((1, 40), 2**40)
    table[0, :2] = torch.tensor([1, 2])
    logits, tokens = some_logits(), [1, 2]

    def begin() -> Sampler:
        sampler = Sampler(num_rows=1, vocab_size=VOCAB, eos_token_ids=(), device=oracle.CPU, token_table=table)
        sampler.admit(0, request, 0, len(tokens))
        return sampler

    sampler = begin()
    for step in range(30):
        if step == 13:
            sampler.release(0)
            sampler.admit(0, request, 0, len(tokens))
        if step == 21:
            sampler = begin()
        drawn = int(sampler.sample(logits[None], [0], torch.tensor([len(tokens)])).token_ids)
        assert drawn == oracle.edited(logits.numpy(), sampling, tokens, 2).argmax()
        table[0, len(tokens)] = drawn
        tokens.append(drawn)
    assert len(set(tokens)) > 5
