"""Whole outputs on pylm against transformers' own greedy decoding: greedy, and drawn where one token only is left."""

from pathlib import Path

import pytest
import torch

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import SamplingParams, StoppingParams

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
LENGTHS = (1, 2, 9, 16, 17, 40, 100, 300)
NEW = 48

ONLY_ONE = {
    "greedy": SamplingParams(temperature=0.0),
    "top_k": SamplingParams(temperature=1.3, top_k=1, seed=7),
    "top_p": SamplingParams(temperature=1.3, top_p=1e-9, seed=8),
    "min_p": SamplingParams(temperature=1.3, min_p=1.0, seed=9),
    "cold": SamplingParams(temperature=1e-6, seed=10),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 4096, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Steps of 64 tokens, so that long prompts come in pieces beside sequences that decode."""
    return Engine.from_pretrained(PYLM, EngineConfig(dtype="float32", max_batch=5, max_step_tokens=64))


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[float, list[list[int]]]:
    """What transformers decodes, by repetition penalty, one prompt at a time."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval()
    found: dict[float, list[list[int]]] = {}
    for penalty in (1.0, 1.3):
        found[penalty] = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                repetition_penalty=penalty,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
            found[penalty].append(whole[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", sorted(ONLY_ONE))
def test_where_one_token_is_left_it_is_transformers(
    name: str, engine: Engine, prompts: list[list[int]], expected: dict[float, list[list[int]]]
) -> None:
    sampling = ONLY_ONE[name]
    stopping = StoppingParams(max_new_tokens=NEW, ignore_eos=True)
    answers = engine.generate(prompts, sampling, stopping)
    assert [list(answer.token_ids) for answer in answers] == expected[sampling.repetition_penalty]


def test_a_seed_is_an_output_whoever_is_beside_it(engine: Engine, prompts: list[list[int]]) -> None:
    stopping = StoppingParams(max_new_tokens=NEW, ignore_eos=True)
    drawn = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
    together = engine.generate(prompts, drawn, stopping)
    alone = [engine.generate([prompt], drawn, stopping)[0] for prompt in reversed(prompts)]
    assert [answer.token_ids for answer in alone][::-1] == [answer.token_ids for answer in together]
    other = engine.generate(prompts, SamplingParams(temperature=0.9, top_p=0.95, seed=6), stopping)
    assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))
