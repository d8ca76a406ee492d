"""What is counted of a request, at exact times."""

import asyncio

import pytest

from pressd.runtime.request import FinishReason, RequestOutput
from pressd.server import measure
from pressd.server import metrics as m
from pressd.server.asked import Asked, Output, TokenPrompt
from pressd.server.errors import late
from pressd.server.generation import Generation


def generation(*, num_prompt: int, arrival: float, num_sequences: int = 1) -> Generation:
    ids = tuple(range(1, num_prompt + 1))
    return Generation(
        Asked(
            request_id="r",
            model="",
            prompt=TokenPrompt(ids),
            sampling={"n": num_sequences},
            output=Output(text=False, ids=True),
        ),
        engine_id="0",
        prompt_token_ids=ids,
        seed=0,
        arrival=arrival,
        bytes_of_token=None,
        abort=lambda index: None,
    )


def say(
    metrics: m.Metrics,
    generation: Generation,
    now: float,
    num_tokens: int,
    index: int = 0,
    *,
    reason: FinishReason | None = None,
    scheduled_at: float = 0.0,
    cached: int = 0,
) -> None:
    """Bring what a step did for a sequence, as the door does."""
    if num_tokens:
        measure.tokens(metrics, generation, generation.strands[index], num_tokens, now)
    output = RequestOutput(
        request_id="0",
        index=index,
        token_ids=(7,) * num_tokens,
        finish_reason=reason,
        scheduled_at=scheduled_at,
        num_cached_tokens=cached,
    )
    generation.push(output, now)


@pytest.fixture
def metrics() -> m.Metrics:
    metrics = m.Metrics("m")
    metrics.loaded = m.Loaded(cache_source="host", layers={})
    return metrics


def ledger(metrics: m.Metrics) -> dict[str, float]:
    """All numbers and sums that are not zero, by name and labels but the model's."""
    found = {}
    for sample in (sample for family in metrics.collect() for sample in family.samples):
        if sample.value and not sample.name.endswith("_bucket"):
            labels = [text for label, text in sample.labels.items() if label != "model"]
            name = sample.name.removeprefix("pressd_").removesuffix("_total")
            found[" ".join([name, *labels])] = sample.value
    return found


def test_times_of_a_request_of_two_sequences(metrics: m.Metrics) -> None:
    request = generation(num_prompt=6, arrival=100.0, num_sequences=2)
    say(metrics, request, 102.0, 0, 0, scheduled_at=101.0, cached=4)
    say(metrics, request, 103.0, 1, 0, scheduled_at=101.0, cached=4)
    say(metrics, request, 104.0, 2, 1, scheduled_at=102.0, cached=4)
    say(metrics, request, 107.0, 4, 0, scheduled_at=101.0, reason=FinishReason.EOS)
    say(metrics, request, 110.0, 1, 1, scheduled_at=102.0, reason=FinishReason.EOS)

    async def read() -> None:
        while await request.next():
            pass

    asyncio.run(read())
    request.first_sent_at = 104.5
    measure.closed(metrics, request)
    assert ledger(metrics) == {
        "generated_tokens": 8,
        "prompt_tokens": 6,
        "cached_prompt_tokens host": 4,
        "request_prompt_tokens_count": 1,
        "request_prompt_tokens_sum": 6,
        "request_generated_tokens_count": 1,
        "request_generated_tokens_sum": 8,
        "request_queue_seconds_count": 1,
        "request_queue_seconds_sum": 1.0,
        "request_prefill_seconds_count": 1,
        "request_prefill_seconds_sum": 2.0,
        "request_decode_seconds_count": 1,
        "request_decode_seconds_sum": 7.0,
        "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": 4.5,
        # Four seconds of four gaps, and six of two, of which one is none: its tokens came together.
        "inter_token_latency_seconds_count": 6,
        "inter_token_latency_seconds_sum": 10.0,
        "time_per_output_token_seconds_count": 2,
        "time_per_output_token_seconds_sum": 1.0 + 3.0,
    }


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_request_that_is_left_is_counted_where_it_was(metrics: m.Metrics, phase: str) -> None:
    request = generation(num_prompt=6, arrival=100.0)
    if phase != "queued":
        say(metrics, request, 102.0, 0, scheduled_at=101.0, cached=4)
    if phase == "decode":
        say(metrics, request, 103.0, 1, scheduled_at=101.0, cached=4)
    measure.closed(metrics, request)
    found = ledger(metrics)
    assert [line for line in found if "cancelled" in line] == [f"requests_cancelled {phase}"]
    assert found.get("request_queue_seconds_sum") == (None if phase == "queued" else 1.0)
    # Of a prompt that brought no token, neither part is counted.
    assert found.get("prompt_tokens") == (6 if phase == "decode" else None)
    assert found.get("cached_prompt_tokens host") == (4 if phase == "decode" else None)


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_tokens_that_come_too_late_are_made_and_nobodys(metrics: m.Metrics, end: str) -> None:
    request = generation(num_prompt=6, arrival=100.0)
    if end == "cancelled":
        request.end(FinishReason.CANCELLED)
    else:
        request.fail(late("QUEUE_TIMEOUT", "too late"))
    for now in (101.0, 102.0, 103.0):
        say(metrics, request, now, 2, scheduled_at=100.5)
    assert ledger(metrics) == {"generated_tokens": 6}
    measure.closed(metrics, request)
    assert ledger(metrics) == {
        "generated_tokens": 6,
        "request_prompt_tokens_count": 1,
        "request_prompt_tokens_sum": 6,
        "request_generated_tokens_count": 1,
    } | ({"requests_cancelled queued": 1} if end == "cancelled" else {})
