"""Inference: messages of pressd.v1 to requests and back, nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from pressd.runtime.request import FinishReason
from pressd.server import translate
from pressd.server.asked import Asked, TextPrompt, check_ids
from pressd.server.calls import CALL
from pressd.server.door import Door
from pressd.server.errors import exhausted, internal, invalid, not_found
from pressd.server.generation import Generation
from pressd.server.text import byte_offsets
from pressd.v1 import generate_pb2, score_pb2, tokens_pb2

# How long a client may leave its stream unread, in seconds.
SLOW_CONSUMER = 30.0

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    """Service Inference, for one model behind a Door."""

    def __init__(self, door: Door, slow_consumer: float = SLOW_CONSUMER) -> None:
        self._door = door
        self._slow_consumer = slow_consumer

    async def Generate(self, request: generate_pb2.GenerateRequest, context: Context) -> generate_pb2.GenerateResponse:
        """Answer with the whole completion."""
        asked = translate.asked(request, CALL.get().request_id)
        async with self._generation(asked, context) as generation:
            pieces = []
            while more := await generation.next_pieces():
                pieces += more
            finished = self._finished(generation)
        completion = generate_pb2.Completion(finished=finished)
        if asked.want_text:
            completion.text = translate.text_of(pieces)
        if asked.want_ids:
            completion.tokens.extend(translate.token(piece, asked) for piece in pieces)
        return generate_pb2.GenerateResponse(
            request_id=asked.request_id, model=self._door.settings.served_name, completions=[completion]
        )

    async def GenerateStream(self, request: generate_pb2.GenerateRequest, context: Context) -> None:
        """Stream Accepted, Deltas and Finished. A reader that is behind gets fewer and larger deltas."""
        asked = translate.asked(request, CALL.get().request_id)
        async with self._generation(asked, context) as generation:
            await self._write(context, generation, generate_pb2.GenerateEvent(accepted=self._accepted(generation)))
            while pieces := await generation.next_pieces():
                await self._write(context, generation, generate_pb2.GenerateEvent(delta=translate.delta(pieces, asked)))
            await self._write(context, generation, generate_pb2.GenerateEvent(finished=self._finished(generation)))

    async def Tokenize(self, request: tokens_pb2.TokenizeRequest, context: Context) -> tokens_pb2.TokenizeResponse:
        """Answer with the ids of a text or a conversation."""
        self._door.require_ready()
        self._door.require_model(request.model)
        match request.WhichOneof("input"):
            case "text":
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                encoding = await self._door.encode(TextPrompt(request.text), add_special_tokens=special)
            case "chat":
                if request.HasField("add_special_tokens"):
                    raise invalid("add_special_tokens", "a chat template brings its own; leave it unset")
                encoding = await self._door.encode(translate.conversation(request.chat))
            case _:
                raise invalid("text", "there is no input; give one of text and chat")
        response = tokens_pb2.TokenizeResponse(ids=encoding.ids)
        if request.offsets:
            spans = await self._door.in_thread(lambda: byte_offsets(encoding))
            response.offsets.extend(tokens_pb2.ByteSpan(begin=begin, end=end) for begin, end in spans)
        if request.HasField("chat"):
            response.rendered = encoding.text
        return response

    async def Detokenize(
        self, request: tokens_pb2.DetokenizeRequest, context: Context
    ) -> tokens_pb2.DetokenizeResponse:
        """Answer with the text of ids."""
        info, _ = self._door.require_ready()
        self._door.require_model(request.model)
        text = self._door.require_text("ids")
        ids = tuple(request.ids)
        check_ids("ids", ids, info)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        decoded = await self._door.in_thread(lambda: text.decode(ids, skip_special_tokens=skip))
        return tokens_pb2.DetokenizeResponse(text=decoded)

    async def Cancel(self, request: generate_pb2.CancelRequest, context: Context) -> generate_pb2.CancelResponse:
        """End a live request."""
        if not request.request_id:
            raise invalid("request_id", "it is required")
        if not self._door.cancel(request.request_id):
            raise not_found("REQUEST_NOT_FOUND", f"no live request has the id {request.request_id!r}")
        return generate_pb2.CancelResponse()

    async def Score(self, request: score_pb2.ScoreRequest, context: Context) -> score_pb2.ScoreResponse:
        """Never reached: what fields.HONOURED does not list is refused before it gets here."""
        raise AssertionError(request)

    @asynccontextmanager
    async def _generation(self, asked: Asked, context: Context) -> AsyncIterator[Generation]:
        """Queue a request. Headers go out only now: a client may retry by itself what was refused without any."""
        call = CALL.get()
        async with self._door.generation(asked, call.arrival) as generation:
            await context.send_initial_metadata((("x-request-id", asked.request_id),))
            try:
                yield generation
            finally:
                call.num_prompt_tokens, call.num_tokens = generation.num_prompt_tokens, generation.num_sent

    def _accepted(self, generation: Generation) -> generate_pb2.Accepted:
        return generate_pb2.Accepted(
            model=self._door.settings.served_name,
            model_version=self._door.version,
            num_prompt_tokens=generation.num_prompt_tokens,
            seed=generation.seed,
        )

    def _finished(self, generation: Generation) -> generate_pb2.Finished:
        assert generation.end is not None
        if generation.end.reason is FinishReason.NUMERIC_ERROR:
            raise internal("NUMERIC_ERROR", "the model's logits are not finite; another dtype may help")
        CALL.get().finish_reason = generation.end.reason.value
        return translate.finished(generation, time.monotonic(), self._door.version)

    async def _write(self, context: Context, generation: Generation, event: generate_pb2.GenerateEvent) -> None:
        """Send one event; raises Refusal if the client does not take it in time."""
        event.request_id = generation.request_id
        try:
            async with asyncio.timeout(self._slow_consumer):
                await context.write(event)
        except TimeoutError:
            problem = f"the stream was not read for {self._slow_consumer:g} s; read faster, or use Generate"
            generation.fail(refusal := exhausted("SLOW_CONSUMER", problem, retry_after=1.0))
            raise refusal from None
