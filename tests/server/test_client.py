"""Deadlines, cancellation, tokens and TLS of the client; and each of its methods, against a real server."""

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_inference import COARSE, PATIENCE, Ask, Code, Fake, Waits, every_way, refusal, serving

from pressd.client import AsyncClient, CallError, Client, Retry, Tls

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def target(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@every_way
def test_timeout_of_the_client_reaches_the_server(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    assert ask(target, timeout=500.0) == answer
    assert 0 < fake.remaining[0] <= 500.0 * COARSE


def test_timeout_of_a_call_goes_before_the_clients(fake: Fake, target: str) -> None:
    with Client(target, timeout=1.0) as client:
        client.generate("x", timeout=500.0)
        assert len(list(client.stream("x", timeout=500.0))) == 2
    assert all(400.0 < remaining <= 500.0 * COARSE for remaining in fake.remaining)


@every_way
def test_deadline_ends_a_call(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    fake.plan = ["hang"]
    (error,) = ask(target, timeout=0.2)
    assert error.code is Code.DEADLINE_EXCEEDED
    assert fake.cancelled.wait(PATIENCE)
    assert len(fake.seen) == 1


def test_leaving_a_stream_early_cancels_it(fake: Fake, target: str) -> None:
    fake.plan = [["hang"]]
    with Client(target) as client:
        stream = client.stream("x")
        assert next(stream).HasField("accepted")
        stream.close()
        assert fake.cancelled.wait(PATIENCE)


def test_leaving_the_client_cancels_its_streams(fake: Fake, target: str) -> None:
    fake.plan = [["hang"]]
    with Client(target) as client:
        stream = client.stream("x")
        next(stream)
    assert fake.cancelled.wait(PATIENCE)
    with pytest.raises(CallError, match="CANCELLED"):
        next(stream)


@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_cancelled_task_cancels_its_call(fake: Fake, target: str, kind: str) -> None:
    fake.plan = ["hang"]

    async def main() -> None:
        async with AsyncClient(target) as client:

            async def read() -> None:
                async for _ in client.stream("x"):
                    pass

            task = asyncio.ensure_future(read() if kind == "stream" else client.generate("x"))
            assert await asyncio.to_thread(fake.arrived.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(fake.cancelled.wait, PATIENCE)

    asyncio.run(main())


def test_cancelled_task_does_not_wait_for_its_next_attempt(fake: Fake, target: str) -> None:
    fake.plan = [refusal(Code.UNAVAILABLE, retry_after=1e6)]
    waiting = threading.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        await asyncio.sleep(seconds)

    async def main() -> None:
        async with AsyncClient(target, retry=Retry(longest_wait=1e7, sleep_async=sleep)) as client:
            task = asyncio.ensure_future(client.generate("x"))
            assert await asyncio.to_thread(waiting.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert len(fake.seen) == 1


@every_way
def test_token_travels_as_a_bearer(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    fake.plan = [refusal(Code.UNAVAILABLE, retry_after=0.0)]
    assert ask(target, token=TOKEN, retry=Waits().policy()) == answer
    assert [seen["authorization"] for seen in fake.seen] == [f"Bearer {TOKEN}"] * 2


@every_way
def test_unix_socket_and_name(fake: Fake, tmp_path: Path, ask: Ask, answer: list[str]) -> None:
    with serving(fake, f"unix:{tmp_path / 'socket'}") as target:
        assert ask(target, token=TOKEN) == answer
    with serving(fake, "localhost:0") as target:
        assert ask(f"dns:///{target}", token=TOKEN) == answer


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of this machine, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is absent")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=fake")
    names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    command = ["openssl", "req", "-x509", *curve, *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return cert, key


@every_way
def test_tls_both_ways(fake: Fake, pem: tuple[Path, Path], ask: Ask, answer: list[str]) -> None:
    cert, key = pem
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, cert.read_bytes(), require_client_auth=True)
    with serving(fake, credentials=credentials) as target:
        assert ask(target, tls=Tls(ca=cert, cert=cert, key=key), token=TOKEN) == answer
        assert fake.seen[0]["authorization"] == f"Bearer {TOKEN}"
        for tls in (Tls(ca=cert), True, False):  # no certificate of ours, no trust in theirs, no TLS
            (error,) = ask(target, tls=tls, retry=None)
            assert error.code is Code.UNAVAILABLE
    assert len(fake.seen) == 1


class Blocking:
    """An AsyncClient, method for method as a Client."""

    def __init__(self, target: str, **told: Any) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> AsyncClient:
            return AsyncClient(target, **told)

        self._client = self._runner.run(connect())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            work = getattr(self._client, name)(*arguments, **named)
            return self._items(work) if hasattr(work, "__anext__") else self._runner.run(work)

        return call

    def _items(self, items: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items)

        try:
            while True:
                yield self._runner.run(following())
        except StopAsyncIteration:
            return
        finally:
            self._runner.run(items.aclose())

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.mark.system
@pytest.mark.parametrize("make", [Client, Blocking])
def test_every_method_against_a_server(make: Any, serve: Any, echo_text: Path, tmp_path: Path) -> None:
    (tokens := tmp_path / "tokens").write_text(f"{TOKEN} admin\n")
    server = serve(echo_text, "--token-file", str(tokens)).await_ready()
    with make(server.target, timeout=PATIENCE, token=TOKEN) as client:
        ids = client.tokenize("hello", model="parrot")
        assert client.detokenize(ids) == "hello"
        assert client.tokenize([{"role": "user", "content": "x"}]) == client.tokenize("user: x\nassistant:")
        answer = client.generate("hello", num_sequences=2, choice=["lo", "x"])
        says = client.detokenize([ord("l"), ord("o")])  # so this engine follows a choice
        assert [completion.text for completion in answer.completions] == [says, says]
        assert [event.WhichOneof("event") for event in client.stream("lo", max_new_tokens=1)][-1] == "finished"
        score = client.score("hello", top_logprobs=2)
        assert (list(score.ids), len(score.logprobs), len(score.top[0].tokens)) == (ids, len(ids) - 1, 2)
        assert list(client.score(ids).logprobs) == list(score.logprobs)
        with pytest.raises(CallError, match="NOT_FOUND"):
            client.cancel("nobody")
        assert (client.model("parrot").name, client.models()[0].name) == ("parrot", "parrot")
        assert client.server_info().version
        assert client.load() == client.load("parrot")
        loads = client.watch_load(interval_ms=100)
        assert [next(loads).draining, next(loads).draining] == [False, False]
        assert client.flush_prefix_cache() == 4  # requests so far: so this engine counts
        assert client.is_serving()
        assert client.is_serving("")
        states = client.watch_serving()
        assert next(states) is True
        assert client.drain(timeout_seconds=PATIENCE) == 0
        assert next(states) is False
        loads.close()
        states.close()
    assert server.process.wait(PATIENCE) == 0


@pytest.mark.system
@pytest.mark.parametrize("make", [Client, Blocking])
def test_missing_token_is_told(make: Any, serve: Any, echo: Path, tmp_path: Path) -> None:
    (tokens := tmp_path / "tokens").write_text(f"{TOKEN}\n")
    server = serve(echo, "--token-file", str(tokens)).await_ready()
    for token, reason in ((None, "TOKEN"), (f"{TOKEN}!", "TOKEN"), (TOKEN, "ADMIN_DISABLED")):
        with make(server.target, timeout=PATIENCE, token=token) as client:
            with pytest.raises(CallError) as caught:
                client.flush_prefix_cache()
            assert caught.value.reason == reason
