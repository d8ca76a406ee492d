"""Inference: messages of pressd.v1 to requests and back, nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from pressd.runtime.request import FinishReason
from pressd.server import answers, measure, translate
from pressd.server.asked import Asked, TextPrompt, TokenPrompt, check_ids
from pressd.server.calls import CALL
from pressd.server.chat import read_chat
from pressd.server.detokenize import Piece
from pressd.server.door import Door
from pressd.server.errors import cancelled, exhausted, invalid, not_found
from pressd.server.generation import Ended, Generation, Said, Scored, Update
from pressd.server.prompts import Prepared, encode
from pressd.server.text import byte_offsets
from pressd.v1 import generate_pb2, score_pb2, tokens_pb2

# How long a client may leave its stream unread, in seconds.
SLOW_CONSUMER = 30.0
# Tokens, and alternatives, of an answer in one piece: a hundred megabytes until it is sent.
MAX_WHOLE = 1 << 20

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    """Service Inference, for one model behind a Door."""

    def __init__(self, door: Door, slow_consumer: float = SLOW_CONSUMER) -> None:
        self._door = door
        self._slow_consumer = slow_consumer

    async def Generate(self, request: generate_pb2.GenerateRequest, context: Context) -> generate_pb2.GenerateResponse:
        """Answer with the whole completions."""
        asked = translate.asked(request, CALL.get().request_id)
        response = generate_pb2.GenerateResponse(request_id=asked.request_id, model=self._door.settings.served_name)
        async with self._generation(asked, context) as (generation, prompt):
            completions = [response.completions.add() for _ in generation.strands]
            texts = [[prompt.echo or ""] for _ in generation.strands]
            while updates := await generation.next():
                for update in updates:
                    await asyncio.sleep(0)  # each may be large, and other calls wait
                    match update:
                        case Scored(pieces=pieces):
                            response.prompt.extend(self._tokens(pieces, asked))
                        case Said(index=index, pieces=pieces):
                            _check_whole(generation)
                            texts[index].append(answers.text_of(pieces))
                            if asked.output.wants_tokens:
                                completions[index].tokens.extend(self._tokens(pieces, asked))
                        case Ended(strand=strand):
                            completions[strand.index].finished.CopyFrom(self._finished(update, generation))
        if asked.output.text:
            for completion, parts in zip(completions, texts, strict=True):
                completion.text = "".join(parts)
        return response

    async def GenerateStream(self, request: generate_pb2.GenerateRequest, context: Context) -> None:
        """Stream Accepted, Deltas and Finished. A reader that is behind gets fewer and larger deltas."""
        asked = translate.asked(request, CALL.get().request_id)
        async with self._generation(asked, context) as (generation, prompt):
            await self._write(context, generation, generate_pb2.GenerateEvent(accepted=self._accepted(generation)))
            if prompt.echo is not None:
                for strand in generation.strands:
                    echo = generate_pb2.Delta(index=strand.index, text=prompt.echo)
                    await self._write(context, generation, generate_pb2.GenerateEvent(delta=echo))
            while updates := await generation.next():
                for update in updates:
                    num_tokens = len(update.pieces) if isinstance(update, Said) else 0
                    await self._write(context, generation, self._event(update, generation), num_tokens)

    async def Score(self, request: score_pb2.ScoreRequest, context: Context) -> score_pb2.ScoreResponse:
        """Answer with the log-probability of each token but the first."""
        info, _ = self._door.require_ready()
        self._door.require_model(request.model)
        prompt = translate.score_prompt(request)
        ids = prompt.ids if isinstance(prompt, TokenPrompt) else (await encode(self._door, prompt)).ids
        check_ids(prompt.field, ids, info)
        if not ids:
            raise invalid(prompt.field, "there are no tokens; at least one is needed")
        response = score_pb2.ScoreResponse(ids=ids, model_version=self._door.version)
        if len(ids) == 1:
            return response
        asked = translate.score_asked(request, ids, prompt.field, CALL.get().request_id)
        async with self._generation(asked, context) as (generation, _):
            while updates := await generation.next():
                for update in updates:
                    await asyncio.sleep(0)  # each may be large, and other calls wait
                    pieces = () if isinstance(update, Ended) else update.pieces
                    for logprobs in (piece.logprobs for piece in pieces if piece.logprobs is not None):
                        response.logprobs.append(logprobs.logprob)
                        if request.top_logprobs:
                            response.top.add(tokens=answers.top(logprobs, self._spell))
            CALL.get().finish_reason = ""
        if generation.was_left:
            raise cancelled("Cancel was called")
        response.total_logprob = sum(response.logprobs)
        return response

    async def Tokenize(self, request: tokens_pb2.TokenizeRequest, context: Context) -> tokens_pb2.TokenizeResponse:
        """Answer with the ids of a text or a conversation."""
        self._door.require_ready()
        self._door.require_model(request.model)
        match request.WhichOneof("input"):
            case "text":
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                text = TextPrompt(request.text, "text")
                encoding = await encode(
                    self._door, text, add_special_tokens=special, bounded=False, spans=request.offsets
                )
            case "chat":
                if request.HasField("add_special_tokens"):
                    raise invalid("add_special_tokens", "a chat template brings its own; leave it unset")
                encoding = await encode(self._door, read_chat(request.chat), spans=request.offsets)
            case _:
                raise invalid("text", "there is no input; give one of text and chat")
        response = tokens_pb2.TokenizeResponse(ids=encoding.ids)
        if request.offsets:
            await self._door.in_thread(
                lambda: response.offsets.extend(
                    tokens_pb2.ByteSpan(begin=begin, end=end) for begin, end in byte_offsets(encoding)
                )
            )
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
        ids = translate.ids_of(request.ids, "ids")
        check_ids("ids", ids, info)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        decoded = await self._door.in_thread(lambda: text.decode(ids, skip_special_tokens=skip))
        return tokens_pb2.DetokenizeResponse(text=decoded)

    async def Cancel(self, request: generate_pb2.CancelRequest, context: Context) -> generate_pb2.CancelResponse:
        """End a live request."""
        if not request.request_id:
            raise invalid("request_id", "it is required")
        generation = self._door.live.find(request.request_id)
        if generation is None:
            raise not_found("REQUEST_NOT_FOUND", f"no live request has the id {request.request_id!r}")
        generation.end(FinishReason.CANCELLED)
        return generate_pb2.CancelResponse()

    @asynccontextmanager
    async def _generation(self, asked: Asked, context: Context) -> AsyncIterator[tuple[Generation, Prepared]]:
        """Queue a request. Headers go out only now: a client may retry by itself what was refused without any."""
        call = CALL.get()
        async with self._door.generation(asked, call.arrival) as (generation, prompt):
            await context.send_initial_metadata((("x-request-id", asked.request_id),))
            try:
                yield generation, prompt
            finally:
                call.num_prompt_tokens, call.num_tokens = generation.num_prompt_tokens, generation.num_sent

    def _accepted(self, generation: Generation) -> generate_pb2.Accepted:
        return generate_pb2.Accepted(
            model=self._door.settings.served_name,
            model_version=self._door.version,
            num_prompt_tokens=generation.num_prompt_tokens,
            seed=generation.seed,
        )

    def _event(self, update: Update, generation: Generation) -> generate_pb2.GenerateEvent:
        match update:
            case Scored(start=start, pieces=pieces):
                chunk = generate_pb2.PromptChunk(start=start, tokens=self._tokens(pieces, generation.asked))
                return generate_pb2.GenerateEvent(prompt=chunk)
            case Said(index=index, pieces=pieces):
                delta = generate_pb2.Delta(index=index, num_tokens=len(pieces))
                if generation.asked.output.text:
                    delta.text = answers.text_of(pieces)
                if generation.asked.output.wants_tokens:
                    delta.tokens.extend(self._tokens(pieces, generation.asked))
                return generate_pb2.GenerateEvent(delta=delta)
            case Ended():
                return generate_pb2.GenerateEvent(finished=self._finished(update, generation))

    def _tokens(self, pieces: Sequence[Piece], asked: Asked) -> Iterator[generate_pb2.Token]:
        return (answers.token(piece, asked.output, self._spell) for piece in pieces)

    def _finished(self, ended: Ended, generation: Generation) -> generate_pb2.Finished:
        message = answers.finished(generation, ended.strand, self._door.version)
        if ended.is_last:
            answers.close(message, generation, time.monotonic())
            assert ended.strand.end is not None
            CALL.get().finish_reason = ended.strand.end.reason.value
        return message

    def _spell(self, token_id: int) -> str:
        return self._door.text.spell(token_id) if self._door.text is not None else ""

    async def _write(
        self, context: Context, generation: Generation, event: generate_pb2.GenerateEvent, num_tokens: int = 0
    ) -> None:
        """Send one event; raises Refusal if the client does not take it in time."""
        event.request_id = generation.request_id
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._slow_consumer):
                await context.write(event)
        except TimeoutError:
            problem = f"the stream was not read for {self._slow_consumer:g} s; read faster, or use Generate"
            generation.give_up(refusal := exhausted("SLOW_CONSUMER", problem, retry_after=1.0))
            raise refusal from None
        measure.written(self._door.metrics, num_tokens=num_tokens, seconds=time.monotonic() - began)


def _check_whole(generation: Generation) -> None:
    """Raise Refusal if an answer in one piece is too large; what was asked for cannot tell, it may end early."""
    if generation.asked.output.wants_tokens and generation.weight * generation.num_sent > MAX_WHOLE:
        problem = f"the answer has over {MAX_WHOLE} tokens and alternatives; ask for less, or use GenerateStream"
        raise invalid("output.top_logprobs" if generation.weight > 1 else "output", problem)
