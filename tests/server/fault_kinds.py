"""Ways in which servers, clients and networks fail, done to one running server beside well-behaved traffic."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from fault_ledger import DRAINING, ENGINE_DOWN, LATE, PATIENCE, SLOW, Attempt, Ledger
from fault_wire import DATA, HEADERS, PING, WINDOW_UPDATE, Frame, RawConnection

from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc

INFERENCE = "/pressd.v1.Inference/"
NUM_WORKERS = 6
# Seconds between two looks, and before a refused worker tries again.
PAUSE = 0.02
# Tokens of an answer that outlasts whoever asked for it, and of one that fills every buffer on its way: with so many
# alternatives a token is 200 bytes or more.
ENDLESS = 900_000
LONG = 2000
NUM_ALTERNATIVES = 20
# What a reader takes without being read: its window of 64 KiB, and no probing for a larger one.
NARROW = (
    ("grpc.http2.lookahead_bytes", 1 << 16),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
# Bytes that are no HTTP/2, by what is wrong with them. All but the first follow a preface and settings.
BROKEN = (
    b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    os.urandom(4096),
    Frame(kind=HEADERS, flags=4, stream=1, payload=b"\xff" * 40).encoded(),  # headers that cannot be decoded
    Frame(kind=HEADERS, flags=4, stream=2, payload=b"\x82").encoded(),  # a stream that only servers may open
    Frame(kind=DATA, stream=1, payload=b"too early").encoded(),
    Frame(kind=PING, payload=b"short").encoded(),
    Frame(kind=WINDOW_UPDATE, payload=bytes(4)).encoded(),  # a window of no size
    b"\xff\xff\xff" + Frame(kind=DATA, stream=1).encoded()[3:],  # a frame of 16 MiB
    Frame(kind=PING, payload=bytes(8)).encoded()[:11],  # half a frame
)


async def take(call: Any, attempt: Attempt) -> bool:
    """Read one event of a stream; False at its end."""
    try:
        event = await call.read()
    except grpc.aio.AioRpcError as error:
        attempt.failed(error)
        return False
    if event is grpc.aio.EOF:
        attempt.end((await call.code()).name)
        return False
    attempt.saw(event)
    return True


async def take_all(call: Any, attempt: Attempt) -> None:
    while await take(call, attempt):
        pass


async def code_of(call: Any) -> str:
    """How a unary call ends."""
    code: str = (await call.code()).name
    return code


class Scene:
    """A server, its clients' ledger, and what some of them left half done."""

    def __init__(self, server: Any, ledger: Ledger, channel: grpc.aio.Channel, rng: random.Random) -> None:
        self.server = server
        self.ledger = ledger
        self.rng = rng
        self._channel = channel
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._control = control_pb2_grpc.ControlStub(channel)
        self._late: list[tuple[grpc.aio.Channel, Any, Attempt]] = []
        self._sockets: list[RawConnection] = []
        self._resting = False

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Well-behaved clients for the length of a block, which ends when all calls have ended."""
        workers = [asyncio.create_task(self._work(random.Random(self.rng.random()))) for _ in range(NUM_WORKERS)]
        yield
        await self.release()
        self._resting = True
        await asyncio.gather(*workers)

    async def release(self) -> None:
        """Read what was left unread and close what was left open."""
        late, self._late = self._late, []
        sockets, self._sockets = self._sockets, []
        for connection in sockets:
            self.rng.choice((connection.close, connection.break_off))()
        await asyncio.gather(*(take_all(call, attempt) for _, call, attempt in late))
        for channel, _, _ in late:
            await channel.close()

    async def kill_engine(self) -> None:
        restarts = (await self._info()).engine_restarts
        with self.ledger.trouble(ENGINE_DOWN):
            os.kill(self.server.engine_pid(), signal.SIGKILL)
            while True:
                info = await self._info()
                if info.engine_restarts > restarts and info.state == control_pb2.SERVER_STATE_READY:
                    break
                await asyncio.sleep(PAUSE)

    async def pause_engine(self) -> None:
        """Calls come in while the engine does nothing, and are answered when it goes on."""
        with self._stopped_engine():
            begun = [await self._begin(self.ledger.open(self._text())) for _ in range(3)]
        await asyncio.gather(*(take_all(call, attempt) for call, attempt in begun if not attempt.ended))

    async def deadline_in_the_queue(self) -> None:
        attempts = [self.ledger.open(self._text(), may_end=LATE) for _ in range(3)]
        with self._stopped_engine():
            await asyncio.gather(*(take_all(self._stream(each, self._moment()), each) for each in attempts))
        assert not [attempt for attempt in attempts if attempt.status[0] == "OK"]

    async def deadline(self) -> None:
        attempt = self.ledger.open(self._digits(), length=ENDLESS, may_end=LATE)
        await take_all(self._stream(attempt, self._moment()), attempt)

    async def cancel(self) -> None:
        """Call Cancel. Its stream ends with what exists, unless it has ended."""
        call, attempt = await self._begin_and_read()
        if attempt.ended:
            return
        attempt.cancel_called = True
        request = generate_pb2.CancelRequest(request_id=attempt.request_id)
        assert await code_of(self._stub.Cancel(request, timeout=PATIENCE)) in ("OK", "NOT_FOUND")
        await take_all(call, attempt)

    async def drop_call(self) -> None:
        call, attempt = await self._begin_and_read()
        if not attempt.ended:
            attempt.left = True
            call.cancel()
            attempt.end("CANCELLED")

    async def late_reader(self) -> None:
        """Read nothing behind Accepted until `release`."""
        channel = grpc.aio.insecure_channel(self.server.target, options=NARROW)
        attempt = self.ledger.open(self._digits(), length=LONG, may_end=SLOW)
        request = attempt.request()
        request.output.top_logprobs = NUM_ALTERNATIVES
        call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request, timeout=2 * PATIENCE)
        if await take(call, attempt):
            self._late.append((channel, call, attempt))
        else:
            await channel.close()

    async def lost_client(self) -> None:
        """A client in the middle of a stream is killed, closes its socket, calls off the stream, or freezes."""
        attempt = self.ledger.open(self._digits(), length=ENDLESS, left=True)
        connection, num_events = RawConnection(self.server.port), self.rng.randrange(1, 20)

        def read() -> int:
            stream = connection.greet().call(INFERENCE + "GenerateStream", attempt.request().SerializeToString())
            for _, message in zip(range(num_events), connection.messages(stream), strict=False):
                attempt.saw(generate_pb2.GenerateEvent.FromString(message))
            return stream

        stream = await asyncio.to_thread(read)
        attempt.end("CANCELLED")
        match self.rng.choice(("killed", "closed", "called off", "frozen")):
            case "killed":
                connection.break_off()
            case "closed":
                connection.close()
            case "called off":
                with contextlib.suppress(OSError):  # if it was refused, the server may have closed
                    connection.reset_stream(stream)
                self._sockets.append(connection)
            case "frozen":
                self._sockets.append(connection)

    async def silent_connection(self) -> None:
        """Connect, say nothing, or no more than a greeting, and stay."""
        connection = RawConnection(self.server.port)
        if self.rng.random() < 0.5:
            connection.greet()
        self._sockets.append(connection)

    async def broken_bytes(self) -> None:
        """What is no HTTP/2, or no gRPC message of the length that it claims, and then nothing more."""
        connection = RawConnection(self.server.port)
        self._sockets.append(connection)
        choice = self.rng.randrange(len(BROKEN) + 2)
        if choice == 0:
            connection.send(BROKEN[0])
        elif choice < len(BROKEN):
            connection.greet().send(BROKEN[choice])
        else:
            announced = (100, (1 << 32) - 1)[choice - len(BROKEN)]
            connection.greet().call(INFERENCE + "Generate", b"too short", announced=announced)

    async def broken_message(self) -> None:
        """A message of no schema, or one that is too large."""
        method = self._channel.unary_unary(INFERENCE + self.rng.choice(("Generate", "Score", "Tokenize", "Cancel")))
        data, code = self.rng.choice(
            ((b"\xff" * self.rng.randrange(1, 300), "INVALID_ARGUMENT"), (bytes(17 << 20), "RESOURCE_EXHAUSTED"))
        )
        assert await code_of(method(data, timeout=PATIENCE)) == code

    async def drain(self) -> None:
        """SIGTERM under load; returns when the process has ended, as it should. Nothing works behind it."""
        begun = [await self._begin(self.ledger.open(self._digits(), length=200)) for _ in range(6)]
        self.ledger.begin_trouble(DRAINING, server_goes=True)
        self.server.process.send_signal(signal.SIGTERM)
        ended = asyncio.to_thread(self.server.process.wait, PATIENCE)
        open_calls = (take_all(call, attempt) for call, attempt in begun if not attempt.ended)
        status, *_ = await asyncio.gather(ended, self.release(), *open_calls)
        self._resting = True
        assert status == 0

    async def _work(self, rng: random.Random) -> None:
        """One well-behaved client: asks, waits for the end, asks again."""
        while not self._resting:
            attempt = self.ledger.open(self._text(rng))
            if rng.random() < 0.7:
                await take_all(self._stream(attempt), attempt)
            else:
                try:
                    attempt.answered(await self._stub.Generate(attempt.request(), timeout=PATIENCE))
                except grpc.aio.AioRpcError as error:
                    attempt.failed(error)
            if attempt.status[0] != "OK":
                await asyncio.sleep(PAUSE)

    async def _begin_and_read(self) -> tuple[Any, Attempt]:
        """Begin a long answer and read some of it."""
        call, attempt = await self._begin(self.ledger.open(self._digits(), length=ENDLESS))
        for _ in range(self.rng.randrange(20)):
            if attempt.ended or not await take(call, attempt):
                break
        return call, attempt

    async def _begin(self, attempt: Attempt) -> tuple[Any, Attempt]:
        call = self._stream(attempt)
        await take(call, attempt)
        return call, attempt

    def _stream(self, attempt: Attempt, timeout: float = PATIENCE) -> Any:
        return self._stub.GenerateStream(attempt.request(), timeout=timeout)

    async def _info(self) -> control_pb2.ServerInfo:
        info: control_pb2.ServerInfo = await self._control.GetServerInfo(
            control_pb2.GetServerInfoRequest(), timeout=PATIENCE
        )
        return info

    @contextlib.contextmanager
    def _stopped_engine(self) -> Iterator[None]:
        process = self.server.engine_pid()
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)

    def _moment(self) -> float:
        return self.rng.uniform(0.01, 0.25)

    def _text(self, rng: random.Random | None = None) -> str:
        """A prompt with characters of one to four tokens, and some tokens of several characters."""
        rng = rng or self.rng
        return "".join(
            rng.choice(("a", "the ", "lo", "ü", "漢", "👩‍🚀", "7", "\n")) for _ in range(rng.randrange(1, 40))
        )

    def _digits(self) -> str:
        """A prompt of one token for each character."""
        return "".join(self.rng.choice("0123456789") for _ in range(self.rng.randrange(1, 40)))


Kind = Callable[[Scene], Any]
# What is done at random; the server goes on after each of them.
KINDS: tuple[Kind, ...] = (
    Scene.kill_engine,
    Scene.pause_engine,
    Scene.deadline_in_the_queue,
    Scene.deadline,
    Scene.cancel,
    Scene.drop_call,
    Scene.late_reader,
    Scene.lost_client,
    Scene.silent_connection,
    Scene.broken_bytes,
    Scene.broken_message,
)
