"""What a drawn token means for its sequence: output, or the end, and why. No torch."""

from pressd.runtime.report import EngineInfo
from pressd.runtime.request import FinishReason, RequestOutput, TokenLogprobs
from pressd.runtime.sequence import Sequence

NOT_FINITE = "the model's logits are not finite numbers"


def emit(
    sequence: Sequence, token: int, logprobs: tuple[TokenLogprobs, ...], info: EngineInfo, now: float
) -> RequestOutput:
    """Append a drawn token to its sequence, unless it is one that ends it, and report it."""
    stopping = sequence.request.stopping
    if token in sequence.stop_ids:
        if not stopping.include_stop:
            return report(sequence, reason=FinishReason.STOP, matched=token)
        return report(sequence, tokens=(token,), reason=FinishReason.STOP, matched=token, logprobs=logprobs)
    if token in info.eos_token_ids and (not stopping.ignore_eos or sequence.matcher is not None):
        # Under a constraint EOS is drawn only where the text is complete: there is nothing to go on with.
        return report(sequence, reason=FinishReason.EOS, matched=token)
    sequence.token_ids.append(token)
    sequence.first_token_at = sequence.first_token_at or now
    reason = None
    if sequence.matcher is not None:
        sequence.matcher.accept(token)
        if sequence.matcher.is_complete:
            reason = FinishReason.CONSTRAINT_COMPLETE
    if reason is None and len(sequence.token_ids) >= sequence.max_length:
        produced = len(sequence.token_ids) - sequence.num_prompt_tokens
        reason = FinishReason.MAX_TOKENS if produced == stopping.max_new_tokens else FinishReason.CONTEXT_LIMIT
    return report(sequence, tokens=(token,), reason=reason, logprobs=logprobs)


def report(
    sequence: Sequence,
    *,
    tokens: tuple[int, ...] = (),
    reason: FinishReason | None = None,
    matched: int | None = None,
    error: str | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
) -> RequestOutput:
    """Say what happened to a sequence."""
    return RequestOutput(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=tokens,
        finish_reason=reason,
        matched_token_id=matched,
        error=error,
        logprobs=logprobs,
        scheduled_at=sequence.scheduled_at,
        first_token_at=sequence.first_token_at,
        num_cached_tokens=sequence.num_cached_tokens,
    )
