"""What once broke the engine, or let one request harm another."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.errors import RequestError
from pressd.runtime.kv_cache import KVCache
from pressd.runtime.params import MAX_STOP_TOKENS, Constraint, SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason, Request, RequestOutput
from pressd.runtime.sequence import Sequence
from pressd.runtime.startup import start

SMALL = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=4, max_step_tokens=16)
GREEDY = SamplingParams(temperature=0.0)
CLEAN = tuple(range(10, 30))
NAN = 96


def request(name: str, prompt: tuple[int, ...], tokens: int = 4, **fields: Any) -> Request:
    stopping = StoppingParams(max_new_tokens=tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=prompt, **({"sampling": GREEDY, "stopping": stopping} | fields))


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    answers: dict[str, list[RequestOutput]] = {}
    for _ in range(2000):
        if not engine.has_work:
            engine.check_integrity()
            return answers
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, []).append(output)
    raise AssertionError("no end")


@pytest.fixture(scope="module")
def spoiled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token whose embedding is NaN."""
    path = tmp_path_factory.mktemp("spoiled")
    for file in tiny_llama.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tail", [0, 1, 25])
def test_what_is_no_number_does_not_reach_those_who_share_a_prefix(spoiled: Path, tail: int, overlap: bool) -> None:
    """In the chunk with the NaN, keys and values of clean tokens before it are NaN too, from the second layer on."""
    engine = Engine.from_pretrained(spoiled, dataclasses.replace(SMALL, overlap=overlap))
    engine.add(request("bad", (*CLEAN, NAN, *CLEAN[:tail])))
    answers = run(engine)
    assert answers["bad"][-1].finish_reason is FinishReason.NUMERIC_ERROR
    engine.add(request("aborted", (*CLEAN, NAN, *CLEAN, *CLEAN)))
    engine.step()
    engine.step()
    engine.abort("aborted")
    engine.add(request("good", (*CLEAN, 5)))
    assert run(engine)["good"][-1].finish_reason is FinishReason.MAX_TOKENS
    assert engine.stats().numeric_errors >= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SamplingParams(seed=3.0), "seed is 3.0"),  # type: ignore[arg-type]
        (lambda: SamplingParams(top_k=True), "top_k is True"),
        (lambda: SamplingParams(n=2.0), "n is 2.0"),  # type: ignore[arg-type]
        (lambda: SamplingParams(top_logprobs=1.5), "top_logprobs is 1.5"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature=float("nan")), "temperature is nan"),
        (lambda: SamplingParams(logit_bias=((1.0, 2.0),)), "logit_bias is 1.0"),  # type: ignore[arg-type]
        (lambda: SamplingParams(allowed_token_ids=(1, 1)), "allowed_token_ids names a token twice"),
        (lambda: SamplingParams(bad_words=((1, 2.0),)), "bad_words"),  # type: ignore[arg-type]
        (lambda: StoppingParams(max_new_tokens=2.5), "max_new_tokens is 2.5"),  # type: ignore[arg-type]
        (lambda: StoppingParams(min_new_tokens=2**63 - 1), "min_new_tokens is 9223372036854775807"),
        (lambda: StoppingParams(stop_token_ids=tuple(range(MAX_STOP_TOKENS + 1))), "at most 1024"),
        (lambda: Constraint(kind="choice", choices=["a"]), "choices a tuple"),  # type: ignore[arg-type]
        (lambda: Constraint(kind="choice", choices=(1,)), "must be a text"),  # type: ignore[arg-type]
        (lambda: Constraint(kind="regex", text=1), "text must be a text"),  # type: ignore[arg-type]
    ],
)
def test_parameters_that_are_no_parameters_are_refused_at_once(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_token_ids": (1, 1.0)}, "prompt"),
        ({"prompt_token_ids": (1, True)}, "prompt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"prompt_token_ids": (1,) * 41}, "prompt"),
        ({"sampling": SamplingParams(allowed_token_ids=(97,))}, "allowed_token_ids"),
        ({"sampling": SamplingParams(bad_words=((1,), (1, 97)))}, "bad_words[1]"),
        ({"sampling": SamplingParams(logit_bias=((-1, 1.0),))}, "logit_bias"),
        ({"stopping": StoppingParams(stop_token_ids=(97,))}, "stop_token_ids"),
    ],
)
def test_requests_that_would_break_a_step_are_refused(tiny_llama: Path, change: dict[str, Any], field: str) -> None:
    engine = Engine.from_pretrained(tiny_llama, dataclasses.replace(SMALL, kv_memory=10 * 4096))
    with pytest.raises(RequestError) as caught:
        engine.add(dataclasses.replace(request("x", (1, 2), 1), **change))
    assert caught.value.field == field
    assert not engine.has_work


def test_a_request_that_cannot_be_queued_leaves_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(tiny_llama, SMALL)

    def refuse(constraint: object) -> None:
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr(engine._guides, "submit", refuse)
    with pytest.raises(RuntimeError, match="no thread"):
        engine.add(request("x", (1, 2), constraint=Constraint(kind="json_object")))
    assert not engine.has_work
    assert not engine.abort("x")


def test_eos_under_a_constraint_waits_for_the_least_tokens(tiny_llama: Path) -> None:
    """EOS ends a constrained text also where it is ignored otherwise, so it counts as an end."""
    engine = Engine.from_pretrained(tiny_llama, SMALL)
    for seed in range(20):
        stopping = StoppingParams(max_new_tokens=12, min_new_tokens=4, ignore_eos=True)
        constraint = Constraint(kind="regex", text="[a-z]*")
        sampling = SamplingParams(temperature=2.0, seed=seed, logit_bias=((0, 30.0),))
        engine.add(request(str(seed), (1, 2), sampling=sampling, stopping=stopping, constraint=constraint))
    for outputs in run(engine).values():
        assert sum(len(output.token_ids) for output in outputs) == 4
        assert outputs[-1].finish_reason is FinishReason.EOS


def live_sequences() -> int:
    gc.collect()
    return sum(type(thing) is Sequence for thing in gc.get_objects())


def test_requests_that_left_are_forgotten(tiny_llama: Path) -> None:
    """Behind one that cannot start yet, and while a grammar that stays cached was compiled for them."""
    engine = Engine.from_pretrained(tiny_llama, dataclasses.replace(SMALL, kv_memory=40 * 4096, max_batch=2))
    before = live_sequences()
    engine.add(request("runs", (1,) * 40, 60))
    engine.add(request("blocked", (2,) * 100, 20))
    engine.step()
    constraint = Constraint(kind="regex", text="[a-c]{1,3}")
    for number in range(600):
        engine.add(request(str(number), (3,)))
        engine.add(request(f"c{number}", (3,), constraint=constraint))
        engine.abort(str(number))
        engine.abort(f"c{number}")
    run(engine)
    assert live_sequences() - before < 200  # a heap that is at least half alive, and what the interpreter still holds
    engine.add(request("last", (3,), constraint=constraint))
    run(engine)
    assert live_sequences() - before < 200


def test_scores_of_a_prompt_do_not_depend_on_chunks_where_nothing_can_be_drawn(tiny_llama: Path) -> None:
    asked = SamplingParams(temperature=0.0, prompt_logprobs=True, allowed_token_ids=(5,), bad_words=((5,),))
    found = []
    for chunk in (16, 64):
        engine = Engine.from_pretrained(tiny_llama, dataclasses.replace(SMALL, max_step_tokens=chunk))
        engine.add(request("x", CLEAN, sampling=asked))
        outputs = run(engine)["x"]
        assert outputs[-1].finish_reason is FinishReason.CONSTRAINT_IMPOSSIBLE
        found.append([entry.token_id for output in outputs for entry in output.prompt_logprobs])
    assert found == [list(CLEAN[1:])] * 2


def test_a_hot_prefix_survives_requests_that_could_grow_long(tiny_llama: Path) -> None:
    """Placement must not throw away what is used often to reserve room that is seldom needed."""
    config = dataclasses.replace(SMALL, max_step_tokens=64, kv_memory=60 * 4096)
    parts = start(tiny_llama, config)
    engine = Engine(dataclasses.replace(parts, kv=KVCache(parts.kv.groups, 4, contiguous=True)), config)
    hot = tuple(range(1, 42))
    engine.add(request("first", hot, 2))
    run(engine)
    hits = []
    for number in range(12):
        # Half of them begin with a part of the hot prefix, and go on otherwise.
        other = (*hot[: 20 * (number % 2)], *(90 - (number * 17 + place) % 80 for place in range(20)))
        engine.add(request(f"other{number}", other, 150, stopping=StoppingParams(max_new_tokens=150)))
        for _ in range(3):
            engine.step()
        engine.abort(f"other{number}")
        engine.add(request(f"hot{number}", hot, 2))
        hits.append(run(engine)[f"hot{number}"][0].num_cached_tokens)
    assert hits == [40] * 12


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_charged_with_its_own_time(tiny_llama: Path, overlap: bool) -> None:
    config = dataclasses.replace(SMALL, overlap=overlap, target_itl=10.0)
    engine = Engine.from_pretrained(tiny_llama, config)
    constraint = Constraint(kind="regex", text="[a-z]{30}")
    engine.add(request("x", (1, 2), 40, constraint=constraint))
    counted = []
    while engine.has_work:
        stats = engine.step().stats
        if stats.num_rows:
            counted.append(stats)
    assert all(0 < step.host_seconds < step.seconds for step in counted)
    # A layer at least was computed in each: a step that only collects is not the step of its launch.
    assert min(step.seconds - step.host_seconds for step in counted) > 1e-5
