"""Whatever fails, and in whatever order: every accepted request gets one end, and nothing of it stays behind."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fault_kinds import KINDS, Kind, take, take_all
from fault_ledger import DRAINING, ENGINE_DOWN, PATIENCE, Attempt, Ledger
from fault_life import Eventually, Life

from pressd.server.access import Access
from pressd.server.call_metrics import CallMetrics
from pressd.server.door import Door, Phase
from pressd.server.interceptors import CallInterceptor
from pressd.server.metrics import Metrics
from pressd.server.servicer import InferenceServicer
from pressd.server.settings import Settings
from pressd.v1 import generate_pb2, inference_pb2_grpc

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
# Faults between two looks at what they left behind.
NUM_IN_A_BLOCK = 20
DIGITS = "0123456789"


def kinds_of(rng: random.Random, num_faults: int) -> list[Kind]:
    """Every kind, and more of them, in any order."""
    kinds = [*KINDS, *rng.choices(KINDS, k=num_faults - len(KINDS))]
    rng.shuffle(kinds)
    return kinds


@pytest.fixture
def text_model(tmp_path: Path, scripted: Any, tokenizer_of: Callable[[Path], int]) -> Path:
    """A scripted model with a tokenizer. Its context is long enough for any prompt of these tests."""
    folder = tmp_path / "parrot"
    made: Path = scripted(folder, vocab_size=tokenizer_of(folder), max_context=1 << 20, kv_blocks=1 << 16)
    return made


@pytest.fixture
def ids_model(tmp_path: Path, scripted: Any) -> Path:
    """One without a tokenizer, which starts sooner."""
    made: Path = scripted(tmp_path / "echo", max_context=1 << 14, kv_blocks=1 << 10)
    return made


@pytest.mark.parametrize(("seed", "num_faults"), [(3, 40), pytest.param(2, 500, marks=pytest.mark.slow)])
def test_random_faults_in_a_row(
    serve: Serve, text_model: Path, eventually: Eventually, seed: int, num_faults: int
) -> None:
    rng = random.Random(seed)
    kinds = kinds_of(rng, num_faults)
    starts = range(0, num_faults, NUM_IN_A_BLOCK)
    drained = rng.sample(starts[: len(starts) // 2], len(starts) // 8 or 1)  # the second half is one server's life

    def new_life() -> Life:
        return Life(serve(text_model, "--max-batch", "4", "--max-queue-requests", "12").await_ready(), eventually)

    life = new_life()
    for start in starts:
        asyncio.run(life.suffer(kinds[start : start + NUM_IN_A_BLOCK], rng, drain=start in drained))
        if start in drained:
            life.check_ends()
            life = new_life()
        else:
            life.check()
    if num_faults >= 500:
        life.check_memory()
    assert life.server.stop() == 0


@pytest.mark.parametrize("seed", range(5))
def test_sigterm_under_load(serve: Serve, ids_model: Path, seed: int) -> None:
    rng = random.Random(seed)
    num_streams, is_cut_short = 64, seed % 2 == 1  # when not, there is time for all
    flags = ("--max-batch", "8", "--max-queue-requests", "56", "--shutdown-timeout", "0" if is_cut_short else "60")
    server, ledger = serve(ids_model, *flags).await_ready(), Ledger()
    # Each stream is accepted and ends: at one of these 128 moments, or beside it, the signal comes.
    moment, num_moments = rng.randrange(1, num_streams if is_cut_short else 2 * num_streams), 0

    async def stream(stub: Any, attempt: Attempt) -> None:
        def passed() -> None:
            nonlocal num_moments
            num_moments += 1
            if num_moments == moment:
                ledger.begin_trouble(DRAINING, server_goes=True)
                server.process.send_signal(signal.SIGTERM)

        call = stub.GenerateStream(attempt.request())
        if await take(call, attempt):
            passed()
            await take_all(call, attempt)
        passed()

    async def main() -> None:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            length = 8000 if is_cut_short else 200
            attempts = [ledger.open(DIGITS, as_ids=True, length=rng.randrange(1, length)) for _ in range(num_streams)]
            await asyncio.gather(*(stream(stub, attempt) for attempt in attempts))

    asyncio.run(main())
    assert server.process.wait(PATIENCE) == 0
    assert ledger.complaints(server.log_lines()) == []
    accepted = Counter(attempt.status for attempt in ledger.attempts if attempt.accepted)
    assert is_cut_short or set(accepted) == {("OK", "")}, accepted


def test_client_that_is_killed_frees_all_it_held(serve: Serve, ids_model: Path) -> None:
    (ids_model / "steps").write_text("3")
    server = serve(ids_model).await_ready()
    command = [sys.executable, str(Path(__file__).parent / "fault_client.py"), server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert [client.stdout.readline() for _ in range(2)] == ["accepted\n", "delta\n"]
        server.await_metric(3, "pressd_engine_steps_total")
        assert server.metric("pressd_kv_cache_blocks", state="used") > 0
        client.kill()
    # No step is allowed any more: what is free is free before the next.
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")
    server.await_metric(0, "pressd_requests_running")
    server.await_metric(1, "pressd_requests_total", code="CANCELLED")
    assert server.metric("pressd_requests_cancelled_total", phase="decode") == 1
    assert server.metric("pressd_engine_steps_total") == 3


def test_engine_that_dies_takes_along_what_it_never_read(serve: Serve, ids_model: Path) -> None:
    server, ledger = serve(ids_model, "--max-batch", "4").await_ready(), Ledger()

    async def main() -> None:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            os.kill(engine := server.engine_pid(), signal.SIGSTOP)
            attempts = [ledger.open(DIGITS, as_ids=True) for _ in range(10)]
            calls = [stub.GenerateStream(attempt.request()) for attempt in attempts]
            for call, attempt in zip(calls, attempts, strict=True):
                assert await take(call, attempt)  # accepted, and sent to an engine that does not read
            with ledger.trouble(ENGINE_DOWN):
                os.kill(engine, signal.SIGKILL)
                await asyncio.gather(*map(take_all, calls, attempts))
            assert {attempt.status for attempt in attempts} == {("UNAVAILABLE", "ENGINE_DOWN")}
            await asyncio.to_thread(server.await_metric, 1, "pressd_engine_restarts_total")
            await asyncio.to_thread(server.await_ready)
            again = ledger.open(DIGITS, as_ids=True)
            await take_all(stub.GenerateStream(again.request()), again)
            assert again.text == DIGITS

    asyncio.run(main())
    assert ledger.complaints(server.log_lines()) == []
    assert server.metric("pressd_prompt_tokens_total") == len(
        DIGITS
    )  # the new engine knows nothing of the old one's requests
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")


def test_engine_that_dies_while_prompts_become_tokens(serve: Serve, text_model: Path) -> None:
    server, ledger = serve(text_model).await_ready(), Ledger()

    async def main() -> None:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            attempts = [ledger.open(DIGITS * 6000, length=3) for _ in range(4)]
            with ledger.trouble(ENGINE_DOWN):
                reading = asyncio.gather(*(take_all(stub.GenerateStream(each.request()), each) for each in attempts))
                await asyncio.to_thread(
                    server.await_metric, 4, "grpc_server_started_total", grpc_method="GenerateStream"
                )
                os.kill(server.engine_pid(), signal.SIGKILL)
                await reading
                await asyncio.to_thread(server.await_metric, 1, "pressd_engine_restarts_total")
                await asyncio.to_thread(server.await_ready)
            again = ledger.open(DIGITS * 6000, length=3)
            await take_all(stub.GenerateStream(again.request()), again)
            assert again.text == "012"

    asyncio.run(main())
    assert ledger.complaints(server.log_lines()) == []
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")


async def finish(stub: Any, ledger: Ledger) -> None:
    attempt = ledger.open(DIGITS, as_ids=True)
    await take_all(stub.GenerateStream(attempt.request()), attempt)


async def miss_the_deadline(stub: Any, ledger: Ledger) -> None:
    attempt = ledger.open(DIGITS, as_ids=True, length=10_000)
    await take_all(stub.GenerateStream(attempt.request(), timeout=0.1), attempt)


async def drop(stub: Any, ledger: Ledger) -> None:
    attempt = ledger.open(DIGITS, as_ids=True, length=10_000)
    call = stub.GenerateStream(attempt.request())
    await take(call, attempt)
    call.cancel()
    attempt.end("CANCELLED")


async def cancel(stub: Any, ledger: Ledger) -> None:
    attempt = ledger.open(DIGITS, as_ids=True, length=10_000)
    call = stub.GenerateStream(attempt.request())
    await take(call, attempt)
    await stub.Cancel(generate_pb2.CancelRequest(request_id=attempt.request_id))
    await take_all(call, attempt)


async def be_refused(stub: Any, ledger: Ledger) -> None:
    attempt = ledger.open("", as_ids=True, length=0)
    await take_all(stub.GenerateStream(attempt.request()), attempt)


def test_no_task_is_left_of_calls_however_they_end(ids_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    async def main() -> None:
        """The server in this process, so that its tasks can be counted."""
        metrics = Metrics("echo")
        door = Door(Settings(model=ids_model, served_name="echo", max_batch=4), metrics, "scripted_engine:create")
        server = grpc.aio.server(interceptors=[CallMetrics(metrics), CallInterceptor(metrics, Access())])
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(door), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        running = asyncio.ensure_future(door.run())
        while door.phase is not Phase.READY:
            await door.changed.wait()
            door.changed.clear()
        before = len(asyncio.all_tasks())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub, ledger = inference_pb2_grpc.InferenceStub(channel), Ledger()
            endings = (finish, miss_the_deadline, drop, cancel, be_refused)
            await asyncio.gather(*(end(stub, ledger) for end in endings * 10))
            assert not [attempt for attempt in ledger.attempts if not attempt.ended]
        await door.live.idle.wait()
        async with asyncio.timeout(PATIENCE):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)

    asyncio.run(main())
