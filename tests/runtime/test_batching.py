"""Sixty-four requests through a pool too small for them, in float64: each gets what it gets alone.

Mixed lengths, arrivals, priorities and ways of sampling; some share prefixes, some are cancelled, some are put back and
computed again. With one KV group and with several, on runs of blocks (as on a CPU) and on scattered ones (as on a GPU),
with results read at once and one step late; also by the runner of a GPU, with graphs that are played.
"""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from fake_graphs import pretend_gpu

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kv_cache import KVCache
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason, Request, RequestOutput
from pressd.runtime.startup import start

VOCABULARY = 97
ALONE = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=4, prefix_cache=False)
# 4 KiB hold a block of the tiny models in all layers: 56 blocks, 224 tokens, for six requests of up to 130.
CROWDED = dataclasses.replace(ALONE, max_batch=6, max_step_tokens=17, kv_memory=56 * 4096, prefix_cache=True)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Qwen2 whose second layer has a sliding window of 21 positions."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        use_sliding_window=True,
        sliding_window=21,
        max_window_layers=1,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "windowed"
    with torch.random.fork_rng():
        torch.manual_seed(12)
        Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def sampling(rng: random.Random, index: int) -> SamplingParams:
    """One of many ways to draw; every fourth is greedy, some of those with penalties."""
    some = {
        "top_k": rng.choice([None, 1, 5, 40]),
        "top_p": rng.choice([1.0, 0.8]),
        "min_p": rng.choice([0.0, 0.05]),
        "typical_p": rng.choice([1.0, 1.0, 0.9]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.7]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.4]),
        "logit_bias": rng.choice([(), ((3, 2.5), (8, -50.0))]),
        "allowed_token_ids": rng.choice([None, None, tuple(range(2, 60))]),
        "bad_words": rng.choice([(), ((5,), (6, 7), (9, 9, 9))]),
        "logprobs": rng.random() < 0.3,
        "top_logprobs": rng.choice([0, 3]),
        "prompt_logprobs": rng.random() < 0.15,
    }
    temperature = 0.0 if index % 4 == 0 else rng.choice([0.5, 1.0, 1.7])
    return SamplingParams(temperature=temperature, seed=rng.randrange(2**64), n=rng.choice([1, 1, 1, 2, 3]), **some)


def make_requests(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    stems = [tuple(rng.randrange(VOCABULARY) for _ in range(length)) for length in (9, 30, 61)]
    requests = []
    for index in range(count):
        tail = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 7, 16, 33])))
        most = rng.choice([1, 5, 24, 36])
        requests.append(
            Request(
                request_id=f"r{index}",
                prompt_token_ids=(*rng.choice([(), *stems]), *tail),
                sampling=sampling(rng, index),
                stopping=StoppingParams(
                    max_new_tokens=most,
                    min_new_tokens=rng.choice([0, min(3, most)]),
                    stop_token_ids=tuple(rng.sample(range(VOCABULARY), 3)),
                    ignore_eos=rng.random() < 0.5,
                ),
                priority=rng.choice([0, 0, 0, 1, 2]),
                cache_salt=rng.choice(["", "", "", "tenant"]),
                bypass_prefix_cache=rng.random() < 0.1,
            )
        )
    return requests


Answers = dict[tuple[str, int], list[RequestOutput]]


def keep(answers: Answers, outputs: tuple[RequestOutput, ...]) -> None:
    for output in outputs:
        answers.setdefault((output.request_id, output.index), []).append(output)


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def alone(path: Path, requests: list[Request]) -> Answers:
    engine = Engine.from_pretrained(path, ALONE)
    answers: Answers = {}
    for request in requests:
        engine.add(request)
        while engine.has_work:
            keep(answers, engine.step().outputs)
    return answers


@pytest.fixture(scope="module", params=["tiny_llama", "windowed"])
def model(request: pytest.FixtureRequest) -> tuple[Path, list[Request], Answers]:
    path = request.getfixturevalue(request.param)
    requests = make_requests(64, seed=5)
    return path, requests, alone(path, requests)


def crowded(path: Path, *, contiguous: bool, overlap: bool) -> Engine:
    config = dataclasses.replace(CROWDED, overlap=overlap)
    parts = start(path, config)
    kv = KVCache(parts.kv.groups, config.block_size, contiguous=contiguous)
    return Engine(dataclasses.replace(parts, kv=kv), config)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("way", ["views", "scattered", "graphs"])
def test_sixty_four_in_a_crowd_equal_each_alone(
    model: tuple[Path, list[Request], Answers], way: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, requests, expected = model
    contiguous = way == "views"
    if way == "graphs":
        pretend_gpu(monkeypatch)
    engine = crowded(path, contiguous=contiguous, overlap=overlap)
    replays = 0
    rng = random.Random(6)
    answers: Answers = {}
    pending, cancelled = list(requests), set()
    while pending or engine.has_work:
        for _ in range(min(len(pending), rng.choice([0, 0, 1, 3]))):
            engine.add(pending.pop(0))
        if rng.random() < 0.05:
            victim = rng.choice(requests).request_id
            if engine.abort(victim):
                cancelled.add(victim)
        result = engine.step()
        keep(answers, result.outputs)
        replays += result.stats.graph == "hit"
        engine.check_integrity()
    assert (replays > 20) == (way == "graphs")
    assert 3 <= len(cancelled) <= 30
    for key, outputs in expected.items():
        got = tokens_of(answers.get(key, []))
        if key[0] in cancelled:
            assert got == tokens_of(outputs)[: len(got)]
        else:
            assert got == tokens_of(outputs)
            compare(answers[key], outputs)
    stats = engine.stats()
    assert stats.kv_blocks_used == stats.num_running == stats.num_waiting == stats.num_preempted == 0
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.evicted_blocks > 0
    assert (stats.kv_copied_blocks > 0) == contiguous
    assert (stats.kv_gathers > 0) == (way != "graphs")
    reasons = {outputs[-1].finish_reason for outputs in answers.values()}
    assert reasons >= {FinishReason.MAX_TOKENS, FinishReason.STOP}


def compare(ours: list[RequestOutput], theirs: list[RequestOutput]) -> None:
    """Reasons, and log-probabilities to 1e-9: float64 sums in another order differ by far less."""
    end, other = ours[-1], theirs[-1]
    assert (end.finish_reason, end.matched_token_id, end.error) == (other.finish_reason, other.matched_token_id, None)
    for name in ("logprobs", "prompt_logprobs"):
        mine = [entry for output in ours for entry in getattr(output, name)]
        wanted = [entry for output in theirs for entry in getattr(output, name)]
        assert [(entry.token_id, *(t for t, _ in entry.top)) for entry in mine] == [
            (entry.token_id, *(t for t, _ in entry.top)) for entry in wanted
        ]
        values = [[entry.logprob, *(value for _, value in entry.top)] for entry in mine]
        assert values == [pytest.approx([e.logprob, *(v for _, v in e.top)], abs=1e-9) for e in wanted]


def test_prompt_and_output_logprobs_are_those_of_transformers(tiny_llama: Path) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    engine = Engine.from_pretrained(tiny_llama, CROWDED)
    prompt = tuple(range(5, 45))
    asked = SamplingParams(temperature=1.2, seed=3, logprobs=True, top_logprobs=2, prompt_logprobs=True)
    engine.add(
        Request(
            request_id="x",
            prompt_token_ids=prompt,
            sampling=asked,
            stopping=StoppingParams(max_new_tokens=9, ignore_eos=True),
        )
    )
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step().outputs
    tokens = [*prompt, *tokens_of(outputs)]
    with torch.inference_mode():
        table = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
    entries = [entry for output in outputs for entry in output.prompt_logprobs]
    entries += [entry for output in outputs for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == tokens[1:]
    for position, entry in enumerate(entries):
        # The same rotary tables in float32 on both sides, everything else in float64.
        assert entry.logprob == pytest.approx(float(table[position, entry.token_id]), abs=1e-5)
        best = table[position].topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_siblings_share_the_prompt_and_draw_apart(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, dataclasses.replace(CROWDED, max_step_tokens=64, kv_memory=2**20))
    prompt = tuple(range(10, 51))
    settings = SamplingParams(temperature=1.5, seed=1, n=4)
    request = Request(
        request_id="x",
        prompt_token_ids=prompt,
        sampling=settings,
        stopping=StoppingParams(max_new_tokens=8, ignore_eos=True),
    )
    engine.add(request)
    answers: Answers = {}
    computed = 0
    while engine.has_work:
        result = engine.step()
        keep(answers, result.outputs)
        computed += result.stats.num_prefill_tokens
    assert sorted(answers) == [("x", index) for index in range(4)]
    assert len({tuple(tokens_of(outputs)) for outputs in answers.values()}) == 4
    # 41 tokens are ten blocks and one token: the prompt once, then one token for each of the other three.
    assert computed == 41 + 3
    assert [answers["x", index][0].num_cached_tokens for index in range(4)] == [0, 40, 40, 40]


def test_a_step_that_finds_its_prompt_cached_computes_the_rest_only(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, dataclasses.replace(CROWDED, max_step_tokens=64))
    prompt = tuple(range(10, 51))
    answers = []
    for number in range(2):
        stopping = StoppingParams(max_new_tokens=4, ignore_eos=True)
        greedy = SamplingParams(temperature=0.0)
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, sampling=greedy, stopping=stopping))
        prefill, tokens = 0, []
        while engine.has_work:
            result = engine.step()
            prefill += result.stats.num_prefill_tokens
            tokens += tokens_of(list(result.outputs))
        answers.append((prefill, tokens))
    assert [prefill for prefill, _ in answers] == [41, 1]
    assert answers[0][1] == answers[1][1]
    assert engine.flush_prefix_cache() == 11  # 44 of 45 tokens, the last of which is never computed
    assert engine.stats().kv_blocks_cached == 0
