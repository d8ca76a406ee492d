"""From plain data to messages of pressd.v1."""

from collections.abc import Callable, Sequence

from pressd.runtime.request import FinishReason, TokenLogprobs
from pressd.server.asked import Output
from pressd.server.detokenize import Piece
from pressd.server.generation import Generation
from pressd.server.strand import Strand
from pressd.v1 import generate_pb2, tokens_pb2

# The text of one token alone; None: the model has no tokenizer.
Spell = Callable[[int], str] | None


def text_of(pieces: Sequence[Piece]) -> str:
    """The text that tokens completed."""
    return "".join(piece.text or "" for piece in pieces)


def token(piece: Piece, wanted: Output, spell: Spell) -> generate_pb2.Token:
    """Write one token."""
    message = generate_pb2.Token(id=piece.token_id, text=piece.text if wanted.text else None)
    if piece.logprobs is not None:
        message.logprob, message.rank = piece.logprobs.logprob, piece.logprobs.rank
        message.top.extend(top(piece.logprobs, spell if wanted.text else None))
    return message


def top(logprobs: TokenLogprobs, spell: Spell) -> list[tokens_pb2.TopLogprob]:
    """Write the most likely tokens of a position."""
    return [
        tokens_pb2.TopLogprob(id=token_id, text=spell(token_id) if spell else None, logprob=logprob)
        for token_id, logprob in logprobs.top
    ]


def finished(generation: Generation, strand: Strand, model_version: str) -> generate_pb2.Finished:
    """Write the end of a sequence."""
    end = strand.end
    assert end is not None
    message = generate_pb2.Finished(
        index=strand.index,
        reason=f"FINISH_REASON_{end.reason.name}",
        seed=generation.seed,
        model_version=model_version,
    )
    if end.stop is not None:
        message.stop = end.stop
    elif end.token_id is not None and end.reason is FinishReason.EOS:
        message.eos_token_id = end.token_id
    elif end.token_id is not None:
        message.stop_token_id = end.token_id
    return message


def close(message: generate_pb2.Finished, generation: Generation, now: float) -> None:
    """Write the counts and times of the whole request into the last Finished; `now` in time.monotonic() seconds."""
    message.usage.prompt_tokens = generation.num_prompt_tokens
    message.usage.completion_tokens = generation.num_sent
    message.usage.cached_prompt_tokens = generation.num_cached_tokens
    timings = message.timings
    timings.total_seconds = now - generation.arrival
    if generation.scheduled_at:
        timings.queue_seconds = generation.scheduled_at - generation.arrival
    if generation.first_token_at:
        timings.prefill_seconds = generation.first_token_at - generation.scheduled_at
        timings.decode_seconds = generation.last_token_at - generation.first_token_at
    if generation.first_sent_at:
        timings.ttft_seconds = generation.first_sent_at - generation.arrival
