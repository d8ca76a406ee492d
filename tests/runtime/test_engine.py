"""The engine on float64 reference kernels: what a request gets does not depend on who else is served."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.errors import RequestError
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason, Request

EXACT = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=5, max_step_tokens=11)


def make_requests(count: int, seed: int) -> list[Request]:
    """Requests of mixed lengths and settings; every third is greedy."""
    rng = random.Random(seed)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(rng.randrange(97) for _ in range(rng.choice([1, 2, 7, 16, 33, 70]))),
            sampling=SamplingParams(
                temperature=0.0 if index % 3 == 0 else rng.choice([0.7, 1.0, 1.5]),
                top_p=rng.choice([1.0, 0.8]),
                seed=rng.randrange(2**64),
            ),
            stopping=StoppingParams(
                max_new_tokens=rng.choice([1, 5, 24]), stop_token_ids=tuple(rng.sample(range(97), 8))
            ),
        )
        for index in range(count)
    ]


def collect(engine: Engine) -> dict[str, tuple[list[int], FinishReason | None]]:
    """Run until there is no work; return tokens and reason by request."""
    answers: dict[str, tuple[list[int], FinishReason | None]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            tokens, _ = answers.get(output.request_id, ([], None))
            answers[output.request_id] = (tokens + list(output.token_ids), output.finish_reason)
        engine.check_integrity()
    return answers


def test_sixteen_together_equal_each_alone(tiny_llama: Path) -> None:
    requests = make_requests(16, seed=1)
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    for request in requests:
        engine.add(request)
    together = collect(engine)
    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    for request in requests:
        engine.add(request)
        assert collect(engine) == {request.request_id: together[request.request_id]}
    assert {reason for _, reason in together.values()} >= {FinishReason.MAX_TOKENS, FinishReason.STOP}


@pytest.mark.parametrize("max_step_tokens", [1, 3, 64])
@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_chunks_and_blocks_do_not_change_the_output(tiny_llama: Path, max_step_tokens: int, block_size: int) -> None:
    requests = make_requests(3, seed=2)
    config = EngineConfig(
        dtype="float64",
        kernels="reference",
        block_size=block_size,
        max_batch=1,
        max_step_tokens=max_step_tokens,
        kv_memory=2**22,
    )
    answers = []
    for settings in (EXACT, config):
        engine = Engine.from_pretrained(tiny_llama, settings)
        for request in requests:
            engine.add(request)
        answers.append(collect(engine))
    assert answers[0] == answers[1]


def test_requests_that_come_and_go_leave_nothing(tiny_llama: Path) -> None:
    """Cancel waiting, prefilling and decoding requests between steps; the rest are unaffected, every block returns."""
    requests = make_requests(12, seed=3)
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    alone = {}
    for request in requests:
        engine.add(request)
        alone |= collect(engine)
    rng = random.Random(4)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    cancelled = set()
    pending = list(requests)
    while pending or engine.has_work:
        if pending:
            engine.add(pending.pop(0))
        if rng.random() < 0.3:
            victim = rng.choice(requests).request_id
            used = engine.stats().kv_blocks_used
            if engine.abort(victim):
                cancelled.add(victim)
                assert engine.stats().kv_blocks_used <= used
            assert not engine.abort(victim), "a second abort finds nothing"
        for output in engine.step().outputs:
            assert output.request_id not in cancelled, "nothing comes from a cancelled request"
            answers[output.request_id] += output.token_ids
        engine.check_integrity()
    assert 0 < len(cancelled) < len(requests)
    for request_id, tokens in answers.items():
        expected = alone[request_id][0]
        assert tokens == (expected[: len(tokens)] if request_id in cancelled else expected)
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_several_sequences_can_be_dropped(tiny_llama: Path, victim: int) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    sampling = SamplingParams(temperature=1.0, seed=3, n=3)
    stopping = StoppingParams(max_new_tokens=12, ignore_eos=True)
    request = Request(request_id="r", prompt_token_ids=tuple(range(20)), sampling=sampling, stopping=stopping)

    def run(drop_after: int | None) -> dict[int, list[int]]:
        engine.add(request)
        said: dict[int, list[int]] = {index: [] for index in range(3)}
        for step in range(100):
            if step == drop_after:
                assert engine.abort("r", victim)
                assert not engine.abort("r", victim), "a second time finds nothing"
            if not engine.has_work:
                break
            for output in engine.step().outputs:
                said[output.index] += output.token_ids
            engine.check_integrity()
        assert engine.stats().kv_blocks_used == 0
        return said

    whole = run(None)
    for drop_after in (0, 2, 6):  # also while the prompt is computed, which the first does for all
        part = run(drop_after)
        assert [part[index] for index in part if index != victim] == [whole[i] for i in whole if i != victim]
        assert part[victim] == whole[victim][: len(part[victim])] != whole[victim]


def test_a_stop_token_can_be_kept_with_its_log_probability(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    sampling = SamplingParams(temperature=0.0, logprobs=True)
    whole, *_ = engine.generate([[1, 2, 3]], sampling, StoppingParams(max_new_tokens=8, ignore_eos=True))
    stop = next(token for index, token in enumerate(whole.token_ids) if index and token not in whole.token_ids[:index])
    place = whole.token_ids.index(stop)
    for kept in (False, True):
        stopping = StoppingParams(max_new_tokens=8, stop_token_ids=(stop,), include_stop=kept, ignore_eos=True)
        (short,) = engine.generate([[1, 2, 3]], sampling, stopping)
        assert short.finish_reason is FinishReason.STOP
        assert short.token_ids == whole.token_ids[: place + kept]
        assert short.logprobs == whole.logprobs[: place + kept]


def test_scattered_blocks_are_gathered_and_agree(tiny_llama: Path) -> None:
    """With no free run long enough a sequence takes pieces and is gathered instead of viewed: counted, and equal."""
    config = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=12, kv_memory=40 * 4 * 1024)
    engine = Engine.from_pretrained(tiny_llama, config)
    assert engine.info.kv_blocks == 40  # 2 layers x 2 (K and V) x 2 heads x 16 x 8 bytes x 4 tokens = 4 KiB a block

    def request(name: str, prompt: tuple[int, ...], tokens: int) -> Request:
        stopping = StoppingParams(max_new_tokens=tokens, ignore_eos=True)
        return Request(request_id=name, prompt_token_ids=prompt, stopping=stopping, bypass_prefix_cache=True)

    for index in range(8):
        engine.add(request(f"small{index}", tuple(range(13)), 40))
    engine.step()
    assert engine.stats().kv_blocks_used == 32, "four blocks each; eight are left to grow into"
    for index in (0, 2, 4):
        engine.abort(f"small{index}")
    wide = request("wide", tuple(range(57)), 2)
    engine.add(wide)
    before = engine.stats().kv_gathers
    engine.step()
    assert engine.stats().kv_gathers > before
    answer: list[int] = []
    while engine.has_work:
        outputs = engine.step().outputs
        answer += [token for output in outputs if output.request_id == "wide" for token in output.token_ids]
        engine.check_integrity()
    engine.add(wide)
    gathers = engine.stats().kv_gathers
    assert collect(engine)["wide"][0][-len(answer) :] == answer
    assert engine.stats().kv_gathers == gathers, "an empty pool serves a contiguous run"


def test_finish_reasons(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    greedy = SamplingParams(temperature=0.0)
    prompt = (3, 4, 5)
    stopping = StoppingParams(max_new_tokens=6, ignore_eos=True)
    tokens = list(engine.generate([prompt], greedy, stopping)[0].token_ids)
    assert len(tokens) == 6

    def finish(stopping: StoppingParams, prompt: tuple[int, ...] = prompt) -> tuple[list[int], FinishReason | None]:
        engine.add(Request(request_id="x", prompt_token_ids=prompt, sampling=greedy, stopping=stopping))
        return collect(engine)["x"]

    first_of_third = tokens.index(tokens[2])
    assert finish(StoppingParams(max_new_tokens=6, stop_token_ids=(tokens[2],), ignore_eos=True)) == (
        tokens[:first_of_third],
        FinishReason.STOP,
    )
    assert finish(StoppingParams(max_new_tokens=2, ignore_eos=True)) == (tokens[:2], FinishReason.MAX_TOKENS)
    long_prompt = (1,) * 250
    answer, reason = finish(StoppingParams(max_new_tokens=50, ignore_eos=True), long_prompt)
    assert (len(answer), reason) == (6, FinishReason.CONTEXT_LIMIT)
    answer, reason = finish(StoppingParams(ignore_eos=True), long_prompt)
    assert (len(answer), reason) == (6, FinishReason.CONTEXT_LIMIT)


def test_eos_ends_a_request_unless_ignored(tiny_llama: Path) -> None:
    """The tiny model's EOS is id 0; among many seeds some draw it."""
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    ended, ignored = 0, 0
    for seed in range(40):
        sampling = SamplingParams(temperature=3.0, seed=seed)
        for ignore in (False, True):
            stopping = StoppingParams(max_new_tokens=20, ignore_eos=ignore)
            engine.add(Request(request_id="x", prompt_token_ids=(9,), sampling=sampling, stopping=stopping))
            tokens, reason = collect(engine)["x"]
            ended += reason is FinishReason.EOS
            ignored += 0 in tokens
            assert (reason is FinishReason.EOS) <= (not ignore)
            assert (0 in tokens) <= ignore
    assert ended > 0
    assert ignored > 0


def test_numeric_error_ends_one_request_only(tiny_llama: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN spoils its own request, not its neighbour's."""
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][13] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.from_pretrained(tmp_path, EXACT)
    stopping = StoppingParams(max_new_tokens=4, ignore_eos=True)
    engine.add(Request(request_id="bad", prompt_token_ids=(13, 2), stopping=stopping))
    engine.add(Request(request_id="good", prompt_token_ids=(12, 2), stopping=stopping))
    answers = collect(engine)
    assert answers["bad"] == ([], FinishReason.NUMERIC_ERROR)
    assert answers["good"][1] is FinishReason.MAX_TOKENS
    assert engine.stats().numeric_errors == 1
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "stopping", "field"),
    [
        ((), StoppingParams(), "prompt"),
        ((1,) * 256, StoppingParams(), "prompt"),
        ((1, 97), StoppingParams(), "prompt"),
        ((1, -1), StoppingParams(), "prompt"),
        ((1,), StoppingParams(stop_token_ids=(97,)), "stop_token_ids"),
        ((1,) * 200, StoppingParams(max_new_tokens=50), "max_new_tokens"),
    ],
)
def test_what_can_never_run_is_refused_by_name(
    tiny_llama: Path, prompt: tuple[int, ...], stopping: StoppingParams, field: str
) -> None:
    config = EngineConfig(dtype="float64", kernels="reference", block_size=4, kv_memory=50 * 4 * 1024)
    engine = Engine.from_pretrained(tiny_llama, config)
    with pytest.raises(RequestError) as caught:
        engine.add(Request(request_id="x", prompt_token_ids=prompt, stopping=stopping))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert not engine.has_work


def test_a_live_id_is_refused(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    request = Request(request_id="x", prompt_token_ids=(1, 2))
    engine.add(request)
    with pytest.raises(RequestError, match="request_id"):
        engine.add(request)


def test_leaving_the_queue_is_reported_before_the_first_token(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    request = Request(
        request_id="x", prompt_token_ids=tuple(range(1, 30)), stopping=StoppingParams(max_new_tokens=1, ignore_eos=True)
    )
    engine.add(request)
    reports = []
    while engine.has_work:
        reports.append([(len(output.token_ids), output.scheduled_at > 0) for output in engine.step().outputs])
    # 29 tokens in chunks of 11, 11 and 7.
    assert reports == [[(0, True)], [], [(1, True)]]


def test_an_idle_step_does_nothing(tiny_llama: Path) -> None:
    engine = Engine.from_pretrained(tiny_llama, EXACT)
    result = engine.step()
    assert result.outputs == ()
    assert result.stats.num_rows == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"kv_memory": -1}, "kv_memory is -1"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"kernels": "magic"}, "kernels 'magic'"),
        ({"kv_dtype": "fp4"}, "kv_dtype 'fp4' is not known; choose one of auto, bf16, int8, fp8"),
        ({"max_batch": 64, "max_step_tokens": 63}, "max_step_tokens"),
    ],
)
def test_config_bounds(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**change)  # type: ignore[arg-type]


def test_start_up_refusals(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="max_context is 257"):
        Engine.from_pretrained(tiny_llama, EngineConfig(max_context=257))
    with pytest.raises(ValueError, match="raise --kv-memory"):
        Engine.from_pretrained(tiny_llama, EngineConfig(kv_memory=10))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            Engine.from_pretrained(tiny_llama, EngineConfig(device="cuda"))
