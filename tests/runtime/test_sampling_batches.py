"""A row's draw is its own: whatever shares its batch, its chunk, or had its row before."""

import pytest
import sampling_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.sampling import Drawn, Sampler, TokenMasks, log_probabilities
from pressd.runtime.sampling import sampler as sampler_module

VOCABS = (1, 31, 97, 4099)


@st.composite
def requests(draw: st.DrawFn, vocab_size: int) -> Request:
    token = st.integers(0, vocab_size - 1)
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5])),
        top_k=draw(st.sampled_from([None, None, 1, 5, 300])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.3, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        typical_p=draw(st.sampled_from([1.0, 1.0, 1.0, 0.6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.4])),
        logit_bias=tuple(draw(st.dictionaries(token, st.sampled_from([-3.0, 2.0]), max_size=3)).items()),
        allowed_token_ids=draw(st.none() | st.lists(token, min_size=1, max_size=9, unique=True).map(tuple)),
        bad_words=tuple(draw(st.lists(st.lists(token, min_size=1, max_size=4).map(tuple), max_size=3))),
        seed=draw(st.integers(0, 2**64 - 1)),
        logprobs=draw(st.booleans()),
        top_logprobs=draw(st.sampled_from([0, 3])),
    )
    stopping = StoppingParams(
        min_new_tokens=draw(st.sampled_from([0, 0, 2, 9])),
        stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
        ignore_eos=draw(st.booleans()),
    )
    prompt = tuple(draw(st.lists(token, min_size=1, max_size=6)))
    return Request(request_id="x", prompt_token_ids=prompt, sampling=sampling, stopping=stopping)


def results(drawn: Drawn, place: int) -> tuple[object, ...]:
    logprobs = drawn.logprobs.by_place().get(place) if drawn.logprobs is not None else None
    return drawn.token_ids[place].item(), drawn.finite[place].item(), drawn.possible[place].item(), logprobs


def comparable(result: tuple[object, ...]) -> tuple[object, ...]:
    """What of a result means something: if there is no token to draw, only that."""
    _, finite, possible, _ = result
    return result if finite and possible else (finite, possible)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_row_depends_on_nothing_but_itself(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from(VOCABS))
    num = data.draw(st.integers(1, 7))
    asked = [data.draw(requests(vocab_size)) for _ in range(num)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    histories = [
        (*request.prompt_token_ids, *torch.randint(vocab_size, (more,), generator=generator).tolist())
        for request, more in zip(asked, data.draw(st.lists(st.integers(0, 5), min_size=num, max_size=num)), strict=True)
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    logits = (3 * torch.randn(num, vocab_size, generator=generator)).to(dtype)
    if data.draw(st.booleans()):
        logits = logits.round()
    for row in data.draw(st.sets(st.integers(0, num - 1), max_size=2)):
        logits[row, data.draw(st.integers(0, vocab_size - 1))] = data.draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf")])
        )
    order = data.draw(st.permutations(range(num)))
    order = order[: data.draw(st.integers(1, num))]
    masked = [place for place in range(len(order)) if data.draw(st.integers(0, 3)) == 0]
    bits = torch.randint(-(2**31), 2**31, (len(masked), -(-vocab_size // 32)), generator=generator).to(torch.int32)
    before = logits.clone()

    sampler = oracle.sampler_for(asked, histories, vocab_size)
    positions = torch.tensor([len(histories[row]) for row in order])
    together = sampler.sample(logits[order].contiguous(), order, positions, TokenMasks(masked, bits))
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    for place, row in enumerate(order):
        alone = oracle.sampler_for([asked[row]], [histories[row]], vocab_size)
        mask = TokenMasks([0], bits[masked.index(place)][None]) if place in masked else None
        single = alone.sample(logits[row][None], [0], torch.tensor([len(histories[row])]), mask)
        assert comparable(results(together, place)) == comparable(results(single, 0))
        assert 0 <= results(together, place)[0] < vocab_size  # type: ignore[operator]
        assert results(together, place)[1] == bool(logits[row].amax().isfinite())


MIXED = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.8),
    SamplingParams(seed=3, top_k=5, frequency_penalty=0.5),
    SamplingParams(seed=4, typical_p=0.7, min_p=0.01),
    SamplingParams(seed=5, repetition_penalty=1.4, top_p=0.5),
    SamplingParams(seed=6, bad_words=((1, 2), (3,)), logit_bias=((4, 1.0),)),
)


def generate(rows_of: list[int], steps: int, *, num_rows: int, batch: int) -> list[list[int]]:
    """Tokens of MIXED's requests in the given rows, `batch` of them drawn together, on logits that are theirs alone."""
    vocab_size = 97
    table = torch.full((num_rows, 64), 2**40)
    sampler = Sampler(num_rows=num_rows, vocab_size=vocab_size, eos_token_ids=[0], device=oracle.CPU, token_table=table)
    tokens = [[number + 1] for number in range(len(MIXED))]
    for number, row in enumerate(rows_of):
        table[row, 0] = number + 1
        sampler.admit(row, oracle.request_for(MIXED[number], (number + 1,)), 0, 1)
    for _ in range(steps):
        for start in range(0, len(rows_of), batch):
            numbers = range(start, min(start + batch, len(rows_of)))
            logits = torch.stack(
                [
                    2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(100 * n + len(tokens[n])))
                    for n in numbers
                ]
            )
            positions = torch.tensor([len(tokens[n]) for n in numbers])
            drawn = sampler.sample(logits, [rows_of[n] for n in numbers], positions)
            for n, token in zip(numbers, drawn.token_ids.tolist(), strict=True):
                table[rows_of[n], len(tokens[n])] = token
                tokens[n].append(token)
    return tokens


def test_sequences_are_the_same_in_any_rows_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate(list(range(7)), 20, num_rows=7, batch=7)
    assert together == generate([8, 3, 0, 5, 1, 2, 7], 20, num_rows=9, batch=1)
    assert together == generate([6, 5, 4, 3, 2, 1, 0], 20, num_rows=7, batch=3)
    monkeypatch.setattr(sampler_module, "_CHUNK", {"cpu": 1})  # a row at a time
    assert together == generate(list(range(7)), 20, num_rows=7, batch=7)


def test_rows_long_enough_for_two_threads_depend_on_nothing_but_themselves() -> None:
    """Where a batch is cut between threads, in the middle of a row and of a vector; the filters' sums are of all."""
    vocab_size, generator = 33001, torch.Generator().manual_seed(2)
    logits = -1.1 * torch.log(torch.rand(7, vocab_size, generator=generator) * vocab_size + 1)
    sampler = oracle.sampler_for([oracle.request_for(sampling) for sampling in MIXED], [(1,)] * 7, vocab_size)
    alone = [oracle.sampler_for([oracle.request_for(sampling)], [(1,)], vocab_size) for sampling in MIXED]
    for step in range(15):
        positions = torch.arange(7) % 3 + 1
        together = sampler.sample(logits, list(range(7)), positions).token_ids.tolist()
        each = [alone[i].sample(logits[i : i + 1], [0], positions[i : i + 1]).token_ids.item() for i in range(7)]
        assert together == each, step
        logits = logits.roll(1, dims=1)


def test_rows_can_be_used_again() -> None:
    """After sequences with penalties, masks and filters, a default one in the row draws as if they had not been."""
    vocab_size, tokens = 97, (1, 2, 3)
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3))
    fresh = oracle.sampler_for([oracle.request_for(SamplingParams(seed=9))], [tokens], vocab_size)
    wanted = [int(fresh.sample(logits, [0], torch.tensor([3 + step])).token_ids) for step in range(5)]
    used = oracle.sampler_for([oracle.request_for(MIXED[3])], [tokens], vocab_size)
    for sampling in MIXED:
        used.release(0)
        used.admit(0, oracle.request_for(sampling), 0, 3)
        used.sample(logits, [0], torch.tensor([3]))
        used.release(0)
        used.admit(0, oracle.request_for(SamplingParams(seed=9)), 0, 3)
        assert wanted == [int(used.sample(logits, [0], torch.tensor([3 + step])).token_ids) for step in range(5)]


def test_rows_must_be_free_to_be_taken_and_taken_to_be_drawn() -> None:
    sampler = oracle.sampler_for([oracle.request_for(SamplingParams())], [(1,)], 5)
    with pytest.raises(AssertionError, match="taken"):
        sampler.admit(0, oracle.request_for(SamplingParams()), 0, 1)
    sampler.release(0)
    with pytest.raises(AssertionError, match="free"):
        sampler.release(0)
    with pytest.raises(AssertionError, match="admitted"):
        sampler.sample(torch.zeros(1, 5), [0], torch.tensor([1]))


def test_a_row_may_be_drawn_at_several_positions_at_once() -> None:
    """As a draft is verified; but not with penalties, whose counts are of one position."""
    tokens, logits = (1, 2, 3), torch.randn(3, 97, generator=torch.Generator().manual_seed(3))
    for sampling in (SamplingParams(seed=4, top_p=0.9), SamplingParams(temperature=0.0, bad_words=((2, 3, 4), (1, 2)))):
        sampler = oracle.sampler_for([oracle.request_for(sampling)], [tokens], 97)
        together = sampler.sample(logits, [0, 0, 0], torch.tensor([1, 2, 3])).token_ids
        each = [sampler.sample(logits[i : i + 1], [0], torch.tensor([i + 1])).token_ids for i in range(3)]
        assert torch.equal(together, torch.cat(each))
    sampler = oracle.sampler_for([oracle.request_for(SamplingParams(presence_penalty=1.0))], [tokens], 97)
    with pytest.raises(AssertionError, match="twice"):
        sampler.sample(logits, [0, 0, 0], torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_an_empty_batch_draws_nothing(vocab_size: int) -> None:
    sampler = oracle.sampler_for([oracle.request_for(SamplingParams())], [(0,)], vocab_size)
    drawn = sampler.sample(torch.zeros(0, vocab_size), [], torch.zeros(0, dtype=torch.int64))
    assert drawn.token_ids.tolist() == drawn.finite.tolist() == drawn.possible.tolist() == []
    assert drawn.token_ids.dtype == torch.int64
    assert drawn.finite.dtype == drawn.possible.dtype == torch.bool


def test_a_row_that_is_not_finite_says_so_and_leaves_the_others_alone() -> None:
    vocab_size = 97
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(0))
    for sampling in MIXED:
        sampler = oracle.sampler_for([oracle.request_for(sampling)] * 7, [(1,)] * 7, vocab_size)
        positions = torch.ones(7, dtype=torch.int64)
        clean = sampler.sample(logits, list(range(7)), positions)
        assert clean.finite.all()
        for row in range(7):
            sampler.release(row)
            sampler.admit(row, oracle.request_for(sampling), 0, 1)
        broken = logits.clone()
        broken[1, 50], broken[3], broken[5, 96], broken[6, 1:] = torch.nan, -torch.inf, torch.inf, -torch.inf
        drawn = sampler.sample(broken, list(range(7)), positions)
        assert drawn.finite.tolist() == [True, False, True, False, True, False, True]
        assert drawn.possible.tolist() == 7 * [True]
        good = [0, 2, 4]
        assert drawn.token_ids[good].tolist() == clean.token_ids[good].tolist()
        assert drawn.token_ids[6] == 0
        assert ((drawn.token_ids >= 0) & (drawn.token_ids < vocab_size)).all()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_are_of_the_raw_model(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(1)).mul(8).round().div(2).to(dtype)
    tokens = torch.arange(5) % vocab_size
    wanted = logits.double().log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for num_top in (0, 1, 5, 64):
        logprob, ranks, ids, top = log_probabilities(logits, tokens, num_top)
        assert logprob.shape == (5,)
        own = logits.gather(1, tokens[:, None]).numpy()
        assert ranks.tolist() == [1 + int((row > mine).sum()) for row, mine in zip(logits.numpy(), own, strict=True)]
        assert torch.equal(ids, order[:, :num_top])
        # Sums of up to 4,099 numbers up to 1 in float64, and a difference of numbers below 40.
        torch.testing.assert_close(logprob, wanted.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(top, wanted.gather(1, ids), rtol=0, atol=1e-13)
    assert [part.shape for part in log_probabilities(logits[:0], tokens[:0], 1)] == [(0,), (0,), (0, 1), (0, 1)]


def test_log_probabilities_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 97, generator=torch.Generator().manual_seed(1))
    whole = log_probabilities(logits, torch.arange(9), 4)
    monkeypatch.setattr("pressd.runtime.sampling.logprobs._CHUNK", {"cpu": 200})
    for part, other in zip(whole, log_probabilities(logits, torch.arange(9), 4), strict=True):
        assert torch.equal(part, other)


def test_those_who_ask_get_log_probabilities_of_what_was_drawn() -> None:
    vocab_size = 97
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1))
    asking = (
        SamplingParams(),
        SamplingParams(logprobs=True, top_logprobs=3, temperature=0.3, logit_bias=((5, 9.0),)),
        SamplingParams(top_k=3),
        SamplingParams(logprobs=True, temperature=0.0),
    )
    sampler = oracle.sampler_for([oracle.request_for(sampling) for sampling in asking], [(1,)] * 4, vocab_size)
    drawn = sampler.sample(logits, [0, 1, 2, 3], torch.ones(4, dtype=torch.int64))
    assert drawn.logprobs is not None
    told = drawn.logprobs.by_place()
    assert sorted(told) == [1, 3]
    assert [told[place].token_id for place in (1, 3)] == drawn.token_ids[[1, 3]].tolist()
    wanted = logits.double().log_softmax(-1)
    for place in (1, 3):
        assert told[place].logprob == pytest.approx(float(wanted[place, told[place].token_id]), abs=1e-13)
    assert [token for token, _ in told[1].top] == logits[1].topk(3).indices.tolist()
    assert told[3].top == ()
    assert sampler.sample(logits[:1], [0], torch.ones(1, dtype=torch.int64)).logprobs is None
