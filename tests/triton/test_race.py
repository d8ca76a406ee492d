"""Draws by the kernel are those of the sampler without it, token for token."""

import pytest
import torch

from pressd.runtime.kernels.race import triton as kernels
from pressd.runtime.params import SamplingParams
from pressd.runtime.request import Request
from pressd.runtime.sampling import Sampler
from pressd.runtime.sampling.noise import exact_times, position_keys, sequence_key

SETTINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.3, seed=2),
    SamplingParams(temperature=2.5, seed=3),
    SamplingParams(temperature=1e-20, seed=4),
    SamplingParams(temperature=1.0, top_k=20, seed=5),
    SamplingParams(temperature=1.0, top_p=0.8, min_p=0.01, seed=6),
    SamplingParams(temperature=0.8, logit_bias=((3, 5.0), (9, -4.0)), bad_words=((4,),), seed=7),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, seed=8),
    SamplingParams(temperature=1.0, allowed_token_ids=(5, 6, 70), logprobs=True, top_logprobs=3, seed=9),
)


def samplers(vocab: int, device: torch.device) -> tuple[Sampler, Sampler]:
    """Return one with the kernel on the device, and one without on the CPU, with the same rows."""
    made = []
    for there, race in ((device, kernels.draw), (torch.device("cpu"), None)):
        generator = torch.Generator().manual_seed(1)
        table = torch.randint(vocab, (len(SETTINGS), 40), generator=generator).to(there)
        sampler = Sampler(
            num_rows=len(SETTINGS), vocab_size=vocab, eos_token_ids=[0], device=there, token_table=table, race=race
        )
        for row, sampling in enumerate(SETTINGS):
            request = Request(request_id=f"r{row}", prompt_token_ids=(1,) * 20, sampling=sampling)
            sampler.admit(row, request, 0, 30)
        made.append(sampler)
    return made[0], made[1]


@pytest.mark.parametrize("vocab", [97, 4096, 9001])
def test_the_sampler_draws_the_same_tokens(device: torch.device, vocab: int) -> None:
    ours, theirs = samplers(vocab, device)
    generator = torch.Generator().manual_seed(vocab)
    for step in range(12):
        rows = torch.randperm(len(SETTINGS), generator=generator)[: 1 + step % len(SETTINGS)].tolist()
        logits = 4 * torch.randn(len(rows), vocab, generator=generator)
        logits[:, ::5] = logits[:, 1::5][:, : logits[:, ::5].shape[1]].mean()  # many are equal
        positions = torch.full((len(rows),), 30 + step)
        found = ours.sample(logits.to(device), rows, positions.to(device))
        expected = theirs.sample(logits, rows, positions)
        assert torch.equal(found.token_ids.cpu(), expected.token_ids), step
        assert torch.equal(found.finite.cpu(), expected.finite)
        assert torch.equal(found.possible.cpu(), expected.possible)


def test_what_is_no_number_is_told_apart(device: torch.device) -> None:
    vocab = 5000
    ours, theirs = samplers(vocab, device)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(2))
    logits[0, 17] = float("nan")
    logits[1, 4999] = float("inf")
    logits[2] = float("-inf")
    logits[3, :4990] = float("-inf")
    logits[4, 4321] = float("nan")
    rows, positions = [0, 1, 2, 3, 5, 6], torch.full((6,), 30)
    found = ours.sample(logits.to(device), rows, positions.to(device))
    expected = theirs.sample(logits, rows, positions)
    assert found.finite.tolist() == expected.finite.tolist() == [False, False, False, True, False, True]
    assert torch.equal(found.possible.cpu(), expected.possible)
    # What is drawn of the others means nothing, and is an id all the same: it may be looked up before anybody knows.
    assert bool(((found.token_ids >= 0) & (found.token_ids < vocab)).all())
    assert found.token_ids[3] >= 4990
    assert torch.equal(found.token_ids.cpu()[expected.finite], expected.token_ids[expected.finite])


def test_times_are_those_of_the_noise(device: torch.device) -> None:
    """The first of a row of equal logits is the first to arrive."""
    keys = position_keys(torch.tensor([sequence_key(seed, 0) for seed in range(50)]), torch.arange(50) + 5)
    expected = exact_times(keys, torch.arange(8200).expand(50, -1)).argmin(-1)
    temperatures = torch.ones(50, dtype=torch.float64)
    tokens, peaks = kernels.draw(torch.full((50, 8200), 3.5, device=device), keys.to(device), temperatures.to(device))
    assert torch.equal(tokens.cpu(), expected)
    assert bool((peaks == 3.5).all())


def test_greedy_takes_the_first_of_equal_maxima(device: torch.device) -> None:
    """Within a chunk, across two, and where the first is the last of its chunk."""
    logits = torch.randn(4, 9001, generator=torch.Generator().manual_seed(3)).clamp(max=3.0)
    for row, places in enumerate(([17, 18], [4095, 4096], [5, 9000], [8200, 8201])):
        logits[row, places] = 7.0
    keys, temperatures = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.float64)
    tokens, _ = kernels.draw(logits.to(device), keys.to(device), temperatures.to(device))
    assert tokens.tolist() == [17, 4095, 5, 8200]


def test_the_last_bits_of_the_noise_decide(device: torch.device) -> None:
    """Of 2^18 tokens some share their 31 leading bits: between two such, the 20 that follow tell who is first."""
    vocab, found = 1 << 18, 0
    token = torch.arange(vocab)
    for position in range(60):
        keys = position_keys(torch.tensor([sequence_key(3, 0)]), torch.tensor([position]))
        times = exact_times(keys, token.view(1, -1))[0]
        leading = (-torch.expm1(-times) * 2.0**31).floor()
        order = leading.argsort()
        for at in (leading[order][1:] == leading[order][:-1]).nonzero().flatten().tolist():
            pair = order[at : at + 2].sort().values
            if times[pair[1]] < times[pair[0]]:
                logits = torch.full((1, vocab), float("-inf"))
                logits[0, pair] = 0.0
                temperatures = torch.ones(1, dtype=torch.float64, device=device)
                assert kernels.draw(logits.to(device), keys.to(device), temperatures)[0].item() == pair[1]
                found += 1
        if found >= 3:
            return
    raise AssertionError("no two tokens share their leading bits")


def test_no_rows(device: torch.device) -> None:
    tokens, peaks = kernels.draw(
        torch.empty(0, 100, device=device),
        torch.empty(0, 2, dtype=torch.int32, device=device),
        torch.empty(0, dtype=torch.float64, device=device),
    )
    assert (tokens.shape, peaks.shape) == ((0,), (0,))
