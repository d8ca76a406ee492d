"""A thousand streams at once: each gets its own text, none waits for another, and what they cost is bounded."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from pressd.client import CallError
from pressd.v1 import generate_pb2, inference_pb2_grpc

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
NUM_STREAMS = 1000
# Seconds that nothing takes.
PATIENCE = 60.0
# Tokens of each prompt, and so of each answer.
LENGTH = 32
# Readers that stop reading. With so many alternatives a token is 200 bytes or more, however few messages bring it, and
# an answer 300 KiB: more than the client's window (WINDOW) and the server's write buffer (64 KiB).
NUM_SLOW = 10
SLOW_LENGTH = 50 * LENGTH
NUM_ALTERNATIVES = 20
WINDOW = (("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0))
# What one open stream may cost the door: gRPC's call and its buffers, the request's tokens, a task. A leak of the sort
# that matters (a buffer of 64 KiB kept for each message, say) is many times that.
BYTES_PER_STREAM = 128 << 10


class Stream:
    """One stream as its reader sees it."""

    def __init__(self, stub: Any, prompt: str, length: int = LENGTH, num_alternatives: int = 0) -> None:
        self.prompt = prompt
        self.length = length
        self.text = ""
        self.num_tokens = 0
        self.finish: Any = None
        request = generate_pb2.GenerateRequest(prompt=prompt)
        request.stopping.ignore_eos, request.stopping.max_new_tokens = True, length
        if num_alternatives:
            request.output.top_logprobs = num_alternatives
        self._call = stub.GenerateStream(request)

    async def begin(self) -> None:
        """Take the Accepted; raises CallError."""
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise CallError(error) from None
        assert event.HasField("accepted")

    async def read(self) -> bool:
        """Take an event; False at the end, which must be that of an answer."""
        event = await self._call.read()
        if event is grpc.aio.EOF:
            assert await self._call.code() is grpc.StatusCode.OK
            assert self.finish.reason == generate_pb2.FINISH_REASON_MAX_TOKENS
            return False
        assert self.finish is None
        if event.HasField("finished"):
            self.finish = event.finished
        else:
            self.text += event.delta.text
            self.num_tokens += event.delta.num_tokens
        return True

    async def read_all(self) -> None:
        while await self.read():
            pass
        times, rest = divmod(self.length, LENGTH)
        assert rest == 0
        assert self.text == self.prompt * times
        assert self.num_tokens == self.finish.usage.completion_tokens == self.length


def prompt_of(number: int) -> str:
    """A text of `LENGTH` tokens that no other number has; some of its characters are three tokens each."""
    rng = random.Random(number)
    prompt = f"{number:04d}{rng.randrange(10**16):016d}" + "".join(rng.choice("漢字€") for _ in range(4))
    assert len(prompt.encode()) == LENGTH  # of these bytes no two make one token
    return prompt


@pytest.fixture
def gated_model(tmp_path: Path, scripted: Any, tokenizer_of: Callable[[Path], int]) -> Path:
    """A parrot that makes no step before it is allowed to."""
    folder = tmp_path / "parrot"
    size = tokenizer_of(folder)
    (folder / "steps").write_text("0")
    model: Path = scripted(folder, vocab_size=size, max_context=1 << 14, kv_blocks=1 << 17)
    return model


@asynccontextmanager
async def stub_of(server: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.target, options=WINDOW) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def rss(server: Any) -> int:
    """Bytes that the door holds."""
    return int(psutil.Process(server.process.pid).memory_info().rss)


async def warm_up(server: Any, stub: Any) -> None:
    """One answer, after which everything that is made once has been made; leaves the gate shut."""
    server.allow_steps(LENGTH)
    stream = Stream(stub, prompt_of(NUM_STREAMS))
    await stream.begin()
    await stream.read_all()


def test_a_thousand_streams_at_once(serve: Serve, gated_model: Path) -> None:
    flags = ("--max-batch", str(NUM_STREAMS), "--max-step-tokens", str(NUM_STREAMS), "--max-queue-requests", "0")
    server = serve(gated_model, *flags).await_ready()

    async def main() -> None:
        async with stub_of(server) as stub:
            await warm_up(server, stub)
            before = rss(server)
            quick = [Stream(stub, prompt_of(number)) for number in range(NUM_STREAMS - NUM_SLOW)]
            slow = [
                Stream(stub, prompt_of(number), SLOW_LENGTH, NUM_ALTERNATIVES)
                for number in range(NUM_STREAMS - NUM_SLOW, NUM_STREAMS)
            ]
            await asyncio.gather(*(stream.begin() for stream in quick + slow))
            await asyncio.to_thread(server.await_metric, NUM_STREAMS, "pressd_requests_running")
            costs = [rss(server) - before]
            progress: list[int] = []

            async def read_quick(stream: Stream) -> None:
                await stream.read_all()
                if not progress:
                    progress.extend(stream.num_tokens for stream in quick)
                    costs.append(rss(server) - before)

            reading = asyncio.gather(*map(read_quick, quick))
            server.allow_steps(LENGTH + LENGTH // 4)  # a quarter of each answer: nobody is left out, nobody is ahead
            async with asyncio.timeout(PATIENCE):
                while not all(stream.num_tokens == LENGTH // 4 for stream in quick):
                    await asyncio.sleep(0.01)
            server.allow_all_steps()
            await reading
            # Everybody got a token in each step, and a reader that is behind gets what it missed with its next message:
            # the slowest may lack what is on its way, some steps of them, and not half an answer.
            assert min(progress) >= LENGTH // 2, sorted(progress)[:10]
            # The engine is done with those who do not read. The door keeps their tokens as numbers; their calls go on.
            num_tokens = LENGTH * (len(quick) + 1) + SLOW_LENGTH * NUM_SLOW
            await asyncio.to_thread(server.await_metric, num_tokens, "pressd_generated_tokens_total")
            costs.append(rss(server) - before)
            assert server.metric("pressd_requests_total", code="OK", method="GenerateStream") == len(quick) + 1
            await asyncio.gather(*(stream.read_all() for stream in slow))
            assert max(costs) <= NUM_STREAMS * BYTES_PER_STREAM, [cost >> 20 for cost in costs]

    asyncio.run(main())
    server.await_metric(NUM_STREAMS + 1, "pressd_requests_total", code="OK", method="GenerateStream")
    server.await_metric(0, "pressd_requests_running")
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")


def test_a_thousand_wait_their_turn_and_no_more_come_in(serve: Serve, gated_model: Path) -> None:
    batch, num_refused = 64, 20
    flags = ("--max-batch", str(batch), "--max-queue-requests", str(NUM_STREAMS - batch))
    server = serve(gated_model, *flags).await_ready()
    ended: list[int] = []

    async def read(number: int, stream: Stream) -> None:
        await stream.read_all()
        ended.append(number)

    async def main() -> None:
        async with stub_of(server) as stub:
            await warm_up(server, stub)
            streams: list[Stream] = []
            while len(streams) < NUM_STREAMS:  # one after another, so that it is known who came first
                streams.append(Stream(stub, prompt_of(len(streams))))
                await streams[-1].begin()
            await asyncio.to_thread(server.await_metric, NUM_STREAMS - batch, "pressd_requests_waiting")
            for number in range(num_refused):
                with pytest.raises(CallError) as caught:
                    await Stream(stub, prompt_of(number)).begin()
                assert (caught.value.code.name, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
                assert caught.value.retry_after
            reading = asyncio.gather(*(read(number, stream) for number, stream in enumerate(streams)))
            # As many steps as a batch has tokens are all that it takes: the first in the queue, and nobody else, end.
            for wave in range(-(-NUM_STREAMS // batch)):
                server.allow_steps((wave + 2) * LENGTH)  # one was for the warm-up
                due = min((wave + 1) * batch, NUM_STREAMS)
                async with asyncio.timeout(PATIENCE):
                    while len(ended) < due:
                        await asyncio.sleep(0.01)
                assert sorted(ended) == list(range(due))
            await reading

    asyncio.run(main())
    assert sorted(ended) == list(range(NUM_STREAMS))
    assert server.metric("pressd_requests_rejected_total", reason="queue_full") == num_refused
    server.await_metric(NUM_STREAMS + 1, "pressd_requests_total", code="OK", method="GenerateStream")
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")
