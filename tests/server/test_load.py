"""Too many, too slow, too late: queues, deadlines, cancels and readers that do not read."""

import asyncio
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import grpc
import grpc.aio
import pytest
from grpc._cython import cygrpc

from pressd.client import CallError
from pressd.server.access import Access
from pressd.server.door import Door, Phase
from pressd.server.interceptors import CallInterceptor
from pressd.server.metrics import Metrics
from pressd.server.servicer import InferenceServicer
from pressd.server.settings import Settings
from pressd.v1 import generate_pb2, inference_pb2_grpc, tokens_pb2

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
Refused = Callable[..., CallError]
IDS = {"text": False, "token_ids": True}


async def read_on(call: Any) -> None:
    """Read a stream to its end."""
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.fixture
def gated(serve: Serve, echo: Path) -> Any:
    """A server that computes one request at a time, lets two wait, and makes no step before it is allowed to."""
    (echo / "steps").write_text("0")
    return serve(echo, "--max-batch", "1", "--max-queue-requests", "2").await_ready()


@pytest.fixture
def client(gated: Any) -> Any:
    with gated.client() as client:
        yield client


def begin(events: Generator[Any]) -> Generator[Any]:
    """Read the Accepted of a stream: from here on the server owes an answer."""
    assert next(events).HasField("accepted")
    return events


def ids_of(events: Iterator[Any]) -> list[int]:
    return [token.id for event in events for token in event.delta.tokens]


def test_full_queue_refuses_and_says_when_to_come_back(gated: Any, client: Any, refused: Refused) -> None:
    streams = [begin(client.stream([n], **IDS)) for n in (5, 6, 7)]
    gated.await_metric(2, "pressd_requests_waiting")
    error = refused(lambda: client.generate([8], **IDS), "RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert error.retry_after is not None
    assert error.retry_after > 0
    gated.await_metric(1, "pressd_requests_rejected_total", reason="queue_full")
    gated.allow_all_steps()
    assert [ids_of(stream) for stream in streams] == [[5], [6], [7]]
    assert client.generate([8], **IDS).completions[0].tokens[0].id == 8


def test_waiting_prompt_tokens_are_bounded_too(serve: Serve, echo: Path, refused: Refused) -> None:
    (echo / "steps").write_text("0")
    server = serve(echo, "--max-queue-tokens", "10").await_ready()
    with server.client() as client:
        first = begin(client.stream([5] * 50, **IDS))  # alone, so it may wait although it is over the bound
        refused(lambda: client.generate([6], **IDS), "RESOURCE_EXHAUSTED", "QUEUE_FULL")
        server.allow_steps(1)
        assert next(first).delta.num_tokens == 1
        second = begin(client.stream([6], **IDS))  # the first no longer waits
        server.allow_all_steps()
        assert ids_of(second) == [6]


def test_closing_the_iterator_frees_all_it_held(gated: Any, client: Any) -> None:
    gated.allow_steps(2)
    stream = begin(client.stream([5] * 40, **IDS))
    assert next(stream).delta.num_tokens > 0
    gated.await_metric(1, "pressd_requests_running")
    assert gated.metric("pressd_kv_cache_blocks", state="used") > 0
    stream.close()
    gated.await_metric(0, "pressd_requests_running")
    gated.await_metric(0, "pressd_kv_cache_blocks", state="used")
    gated.await_metric(1, "pressd_requests_total", code="CANCELLED")
    assert gated.metric("pressd_requests_cancelled_total", phase="decode") == 1


def test_cancel_ends_a_stream_with_what_exists(gated: Any, client: Any, refused: Refused) -> None:
    gated.allow_steps(3)
    stream = begin(client.stream([5, 6, 7, 8], request_id="long", **IDS))
    got: list[int] = []
    while len(got) < 3:
        got += [token.id for token in next(stream).delta.tokens]
    client.cancel("long")
    (last,) = stream
    assert last.finished.reason == generate_pb2.FINISH_REASON_CANCELLED
    assert last.finished.usage.completion_tokens == 3
    gated.await_metric(0, "pressd_kv_cache_blocks", state="used")
    gated.await_metric(1, "pressd_requests_total", code="OK", finish_reason="cancelled")
    refused(lambda: client.cancel("long"), "NOT_FOUND", "REQUEST_NOT_FOUND")


def test_cancel_ends_a_whole_answer_too(gated: Any) -> None:
    async def main() -> Any:
        async with gated.async_client() as client:
            answer = asyncio.ensure_future(client.generate([5], request_id="whole", **IDS))
            while gated.metric("pressd_requests_running") == 0:
                await asyncio.sleep(0)
            await client.cancel("whole")
            return await answer

    finished = asyncio.run(main()).completions[0].finished
    assert (finished.reason, finished.usage.completion_tokens) == (generate_pb2.FINISH_REASON_CANCELLED, 0)


def test_name_of_a_live_request_is_taken_until_it_ends(gated: Any, client: Any, refused: Refused) -> None:
    stream = begin(client.stream([5], request_id="same", **IDS))
    refused(lambda: client.generate([6], request_id="same", **IDS), "ALREADY_EXISTS", "DUPLICATE_REQUEST_ID")
    stream.close()
    gated.await_metric(0, "pressd_requests_running")
    gated.allow_all_steps()
    assert client.generate([6], request_id="same", **IDS).completions[0].tokens[0].id == 6


def test_deadline_holds_in_the_queue_and_while_running(gated: Any, client: Any) -> None:
    with gated.client(timeout=1.0) as hasty:
        running = begin(hasty.stream([5], **IDS))
        waiting = begin(hasty.stream([6], **IDS))
        gated.await_metric(1, "pressd_requests_waiting")
        for stream in (running, waiting):
            with pytest.raises(CallError) as caught:
                next(stream)
            assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    gated.await_metric(0, "pressd_requests_running")
    gated.await_metric(0, "pressd_requests_waiting")
    gated.await_metric(0, "pressd_kv_cache_blocks", state="used")
    gated.await_metric(2, "pressd_requests_total", code="DEADLINE_EXCEEDED")
    # Nothing was computed for either, so nobody can tell the one that ran from the one that waited.
    assert gated.metric("pressd_requests_cancelled_total", phase="queued") == 2


def test_request_that_needs_more_than_the_pool_is_refused(serve: Serve, scripted: Any, tmp_path: Path) -> None:
    model = scripted(tmp_path / "small", max_context=512, kv_blocks=2)  # 32 tokens in blocks of 16
    server = serve(model).await_ready()
    with server.client() as client:
        # The last token of a sequence needs no place: 30 + 3 fit, 30 + 4 do not.
        assert len(client.generate([5] * 30, max_new_tokens=3, **IDS).completions[0].tokens) == 3
        with pytest.raises(CallError) as caught:
            client.generate([5] * 30, max_new_tokens=4, **IDS)
        assert (caught.value.code.name, caught.value.reason) == ("INVALID_ARGUMENT", "KV_CAPACITY")
        assert list(caught.value.fields) == ["stopping.max_new_tokens"]
        # Left unset, the bound is what the pool holds.
        assert len(client.generate([5] * 30, ignore_eos=True, **IDS).completions[0].tokens) == 3
        server.await_metric(1, "pressd_requests_rejected_total", reason="kv_capacity")


def test_model_without_a_tokenizer_takes_and_gives_ids(gated: Any, client: Any, refused: Refused) -> None:
    assert not client.model().capabilities.text
    for action, field in (
        (lambda: client.generate("text", **IDS), "prompt"),
        (lambda: client.generate([5]), "output.text"),
        (lambda: client.generate([5], stop=["x"], **IDS), "stopping.stop"),
        (lambda: client.tokenize("text"), "text"),
        (lambda: client.detokenize([5]), "ids"),
    ):
        error = refused(action, "INVALID_ARGUMENT", "INVALID_FIELD")
        assert list(error.fields) == [field]


def test_storm_of_dropped_calls_leaves_nothing(serve: Serve, echo: Path) -> None:
    server = serve(echo, "--max-batch", "8").await_ready()

    async def take(client: Any, num_events: int) -> None:
        stream = client.stream([5, 6], ignore_eos=True, max_new_tokens=200, **IDS)
        for _ in range(num_events):
            await anext(stream)
        await stream.aclose()

    async def main() -> None:
        async with server.async_client() as client:
            await asyncio.gather(*(take(client, number % 6) for number in range(90)))

    asyncio.run(main())
    server.await_metric(0, "pressd_requests_running")
    server.await_metric(0, "pressd_requests_waiting")
    server.await_metric(0, "pressd_kv_cache_usage_ratio")
    assert server.metric("pressd_requests_total", code="INTERNAL") == 0
    assert not [line for line in server.log_lines() if line["level"] == "error"]
    with server.client() as client:
        assert client.generate([5], **IDS).completions[0].tokens[0].id == 5


def test_reader_that_is_behind_gets_larger_deltas(gated: Any, client: Any) -> None:
    stream = begin(client.stream([5], ignore_eos=True, max_new_tokens=300, **IDS))
    gated.allow_all_steps()
    gated.await_metric(300, "pressd_generated_tokens_total")
    events = list(stream)
    assert sum(event.delta.num_tokens for event in events) == 300
    assert events[-1].finished.usage.completion_tokens == 300


@pytest.mark.parametrize(
    ("error", "is_done", "is_defect"),
    [
        (cygrpc.ExecuteBatchError(), False, False),  # broken off in the middle of a write, before gRPC says so
        (grpc.aio.UsageError("the call is over"), True, False),
        (KeyError("ours"), False, True),
    ],
)
def test_client_that_breaks_off_while_it_is_written_to_is_no_defect(
    error: Exception, is_done: bool, is_defect: bool, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics("m")
    context = Mock(spec=grpc.aio.ServicerContext)
    context.done.return_value = is_done
    context.time_remaining.return_value = None
    context.invocation_metadata.return_value = ()
    context.abort.side_effect = grpc.aio.AbortError

    async def behaviour(request: Any, context: Any) -> None:
        raise error

    async def main() -> None:
        handler = grpc.unary_stream_rpc_method_handler(
            behaviour, request_deserializer=generate_pb2.GenerateRequest.FromString
        )
        details = Mock(method="/pressd.v1.Inference/GenerateStream", invocation_metadata=())
        interceptor = CallInterceptor(metrics, Access())
        wrapped = await interceptor.intercept_service(AsyncMock(return_value=handler), details)
        await wrapped.unary_stream(b"", context)

    with caplog.at_level("INFO"), pytest.raises(grpc.aio.AbortError if is_defect else asyncio.CancelledError):
        asyncio.run(main())
    assert ("a defect" in caplog.messages) == is_defect
    (line,) = [record for record in caplog.records if record.message == "call"]
    assert line.code == ("INTERNAL" if is_defect else "CANCELLED")  # type: ignore[attr-defined]


def test_reader_that_does_not_read_is_dropped(scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens = 1 << 18
    model = scripted(tmp_path / "endless", max_context=1 << 19, kv_blocks=1 << 15, burst=512)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    async def main() -> tuple[Any, Door]:
        metrics = Metrics("endless")
        door = Door(Settings(model=model, served_name="endless"), metrics, "scripted_engine:create")
        server = grpc.aio.server(interceptors=[CallInterceptor(metrics, Access())])
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(door, slow_consumer=0.5), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        running = asyncio.ensure_future(door.run())
        while door.phase is not Phase.READY:
            await door.changed.wait()
            door.changed.clear()
        request = generate_pb2.GenerateRequest(token_ids=tokens_pb2.TokenIds(ids=[5]))
        request.stopping.max_new_tokens = num_tokens
        request.stopping.ignore_eos = True
        request.output.text = False
        request.output.token_ids = True
        window = (("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0))  # what fits in between
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=window) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
            assert (await call.read()).HasField("accepted")
            await door.live.idle.wait()  # the server has given the request up, although nobody dropped the call
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_on(call)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)
        return caught.value, door

    error, door = asyncio.run(main())
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "was not read for 0.5 s" in error.details()
    assert door.admission.num_requests == 0
