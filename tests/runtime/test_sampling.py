"""Draws, for every setting, against probabilities by sorts and loops in float64; and that wrong ones do not pass."""

from dataclasses import replace

import numpy as np
import pytest
import sampling_oracle as oracle
import torch

from pressd.runtime.params import SamplingParams
from pressd.runtime.sampling import noise
from pressd.runtime.sampling import sampler as sampler_module

VOCAB, DRAWS = 41, 20000
LOGITS = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
# Prompt of four tokens, one of which comes again, and an output with repetitions of the likeliest token.
TOKENS, NUM_PROMPT = (3, 4, 4, 11, 3, 16, 16, 16, 31, 7), 4


def params(**fields: object) -> SamplingParams:
    return SamplingParams(seed=12345, **fields)  # type: ignore[arg-type]


SETTINGS = {
    "plain": params(),
    "cold": params(temperature=0.5),
    "hot": params(temperature=1.7),
    "top_k": params(top_k=7),
    "top_k 1": params(top_k=1),
    "top_k all": params(top_k=1000),
    "top_p": params(top_p=0.7),
    "top_p, little": params(top_p=0.05, temperature=2.0),
    "top_p, nearly all": params(top_p=0.999),
    "min_p": params(min_p=0.1),
    "min_p 1": params(min_p=1.0),
    "typical_p": params(typical_p=0.6),
    "typical_p, cold": params(typical_p=0.3, temperature=0.4),
    "top_k, top_p": params(top_k=12, top_p=0.8, temperature=1.3),
    "top_p, min_p": params(top_p=0.9, min_p=0.05, temperature=0.9),
    "top_k, min_p": params(top_k=20, min_p=0.08),
    "all filters": params(top_k=30, top_p=0.95, typical_p=0.8, min_p=0.02, temperature=1.2),
    "repetition": params(repetition_penalty=1.8),
    "repetition below 1": params(repetition_penalty=0.6),
    "presence": params(presence_penalty=1.1),
    "frequency": params(frequency_penalty=0.5),
    "negative penalties": params(frequency_penalty=-0.3, presence_penalty=-0.4),
    "bias": params(logit_bias=((0, 2.5), (4, -100.0), (40, -1.0))),
    "allowed": params(allowed_token_ids=(0, 3, 8, 39, 40)),
    "everything": params(
        temperature=1.4,
        top_k=25,
        top_p=0.97,
        min_p=0.01,
        typical_p=0.95,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias=((20, 3.0), (5, 1.0)),
        allowed_token_ids=tuple(range(40)),
    ),
}


def expected(sampling: SamplingParams, num_prompt: int = NUM_PROMPT) -> np.ndarray:
    edited = oracle.edited(LOGITS.double().numpy(), sampling, TOKENS, num_prompt)
    return np.asarray(oracle.distribution(edited, sampling))


def counted(sampling: SamplingParams, num_prompt: int = NUM_PROMPT) -> np.ndarray:
    return np.asarray(oracle.count_draws(LOGITS, sampling, DRAWS, tokens=TOKENS, num_prompt=num_prompt))


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_the_distribution(setting: str) -> None:
    sampling = SETTINGS[setting]
    assert oracle.p_value(counted(sampling), expected(sampling)) > oracle.SIGNIFICANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_a_large_vocabulary_do(dtype: torch.dtype) -> None:
    """4,099 tokens, most of them rare, many equally likely."""
    generator = torch.Generator().manual_seed(1)
    logits = (-1.2 * torch.log(torch.randperm(4099, generator=generator) + 1.0)).bfloat16().to(dtype)
    for sampling in (params(), params(top_p=0.8, temperature=1.1), params(top_k=300, typical_p=0.9)):
        counts = oracle.count_draws(logits, sampling, 6000)
        probabilities = oracle.distribution(logits.double().numpy(), sampling)
        assert oracle.p_value(counts, probabilities) > oracle.SIGNIFICANCE


# What a sampler with a fault would do, as the right one does it with another setting.
WRONG = {
    "top_k keeps one more": (params(top_k=7), params(top_k=8)),
    "top_k keeps one less": (params(top_k=7), params(top_k=6)),
    "temperature is forgotten": (params(temperature=0.8), params()),
    "temperature multiplies": (params(temperature=0.8), params(temperature=1.25)),
    "top_p is forgotten": (params(top_p=0.95), params()),
    "top_p leaves out the token that reaches it": (params(top_p=0.7), params(top_p=0.64)),
    "min_p is of all": (params(min_p=0.1), params(min_p=0.02)),
    "typical_p is top_p": (params(typical_p=0.3, temperature=2.0), params(top_p=0.3, temperature=2.0)),
    "penalties add": (params(frequency_penalty=0.5), params(frequency_penalty=-0.5)),
    "presence is frequency": (params(presence_penalty=1.1), params(frequency_penalty=1.1)),
    "repetition multiplies": (params(repetition_penalty=1.25), params(repetition_penalty=0.8)),
    "bias is subtracted": (params(logit_bias=((0, 0.5),)), params(logit_bias=((0, -0.5),))),
    "a token too many is allowed": (params(allowed_token_ids=(1, 2, 3)), params(allowed_token_ids=(1, 2, 3, 40))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_draws_do_not_pass(fault: str) -> None:
    right, wrong = WRONG[fault]
    assert oracle.p_value(counted(wrong), expected(right)) < oracle.SIGNIFICANCE


def test_counting_the_prompt_as_output_does_not_pass() -> None:
    sampling = params(frequency_penalty=1.0)
    assert oracle.p_value(counted(sampling, num_prompt=1), expected(sampling)) < oracle.SIGNIFICANCE


def test_counting_the_output_alone_as_repetition_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = params(repetition_penalty=1.8)
    admit = sampler_module.Penalties.admit
    monkeypatch.setattr(
        sampler_module.Penalties,
        "admit",
        lambda self, row, params, tokens, num_prompt: admit(self, row, params, tokens[num_prompt:], 0),
    )
    assert oracle.p_value(counted(sampling), expected(sampling)) < oracle.SIGNIFICANCE


def test_filters_in_another_order_do_not_pass() -> None:
    """top_p before top_k keeps a different set where the mass of the first k is well below one."""
    sampling = params(top_k=10, top_p=0.8, temperature=2.5)
    logits = LOGITS.double().numpy()
    first_p = oracle.distribution(logits, replace(sampling, top_k=None))
    wrong = oracle.distribution(np.where(first_p > 0, logits, -np.inf), replace(sampling, top_p=1.0))
    assert oracle.p_value(counted(sampling), expected(sampling)) > oracle.SIGNIFICANCE
    assert oracle.p_value(counted(sampling), wrong) < oracle.SIGNIFICANCE


def pairs(first: SamplingParams, second: SamplingParams, shift: int, index: int = 0) -> np.ndarray:
    """Counts of pairs of draws, [4 * 4], at positions p under `first` and p + shift under `second`."""
    logits = torch.tensor([0.0, 0.5, 1.0, -0.5])
    num_rows, num_steps = 200, 40
    drawn = []
    for sampling, start, of in ((first, 0, 0), (second, shift, index)):
        request = oracle.request_for(sampling)
        sampler = oracle.sampler_for([request] * num_rows, [(1,)] * num_rows, 4, index=of)
        for step in range(num_steps):
            positions = torch.arange(num_rows) + start + step * num_rows
            rows = sampler.sample(logits.repeat(num_rows, 1), list(range(num_rows)), positions).token_ids
            drawn.append(rows.numpy())
    before, after = (np.concatenate(drawn[i : i + num_steps]) for i in (0, num_steps))
    return np.bincount(before * 4 + after, minlength=16)


def squared() -> np.ndarray:
    p = oracle.distribution(np.array([0.0, 0.5, 1.0, -0.5]), SamplingParams())
    return np.outer(p, p).ravel()


@pytest.mark.parametrize(
    ("seeds", "shift", "index"), [((7, 8), 0, 0), ((7, 7), 1, 0), ((7, 7), 64, 0), ((7, 7), 0, 1), ((7, 8), 1, 2)]
)
def test_draws_of_other_seeds_positions_and_indices_are_independent(
    seeds: tuple[int, int], shift: int, index: int
) -> None:
    first, second = (SamplingParams(seed=seed) for seed in seeds)
    assert oracle.p_value(pairs(first, second, shift, index), squared()) > oracle.SIGNIFICANCE


def test_noise_reused_along_positions_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampler_module.position_keys
    monkeypatch.setattr(sampler_module, "position_keys", lambda keys, positions: real(keys, positions // 2))
    assert oracle.p_value(pairs(SamplingParams(), SamplingParams(), 1), squared()) < oracle.SIGNIFICANCE


def test_noise_reused_for_sequences_of_a_request_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampler_module.sequence_key
    monkeypatch.setattr(sampler_module, "sequence_key", lambda seed, index: real(seed, 0))
    assert oracle.p_value(pairs(SamplingParams(), SamplingParams(), 0, 1), squared()) < oracle.SIGNIFICANCE


def test_noise_shared_by_neighbouring_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pressd.runtime.sampling.race.exact_times", lambda keys, tokens: noise.exact_times(keys, tokens // 2)
    )
    assert oracle.p_value(counted(params()), expected(params())) < oracle.SIGNIFICANCE


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, -1.0, 3.0], [-5.0, -4.0, -4.0, -4.5]])
    sampler = oracle.sampler_for([oracle.request_for(SamplingParams(temperature=0.0))] * 3, [(1,)] * 3, 4)
    assert sampler.sample(logits, [0, 1, 2], torch.ones(3, dtype=torch.int64)).token_ids.tolist() == [1, 0, 1]


def test_penalties_bias_and_masks_apply_to_greedy_rows() -> None:
    for name in ("repetition", "presence", "frequency", "bias", "allowed", "everything"):
        sampling = replace(SETTINGS[name], temperature=0.0)
        sampler = oracle.sampler_for([oracle.request_for(sampling, TOKENS[:NUM_PROMPT])], [TOKENS], VOCAB)
        drawn = sampler.sample(LOGITS[None], [0], torch.tensor([len(TOKENS)])).token_ids
        edited = oracle.edited(LOGITS.double().numpy(), sampling, TOKENS, NUM_PROMPT)
        assert drawn.tolist() == [int(edited.argmax())], name


def test_a_temperature_near_nothing_draws_the_largest_and_equals_evenly() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.9999, 3.0])
    counts = oracle.count_draws(logits, params(temperature=1e-300), DRAWS)
    assert oracle.p_value(counts, np.array([0, 1, 1, 0, 1]) / 3) > oracle.SIGNIFICANCE


def test_huge_differences_and_forbidden_tokens_are_no_trouble() -> None:
    logits = torch.tensor([-3e38, 3e38, float("-inf"), 3e38, 0.0])
    counts = oracle.count_draws(logits, params(temperature=0.01), DRAWS)
    assert oracle.p_value(counts, np.array([0, 1, 0, 1, 0]) / 2) > oracle.SIGNIFICANCE
