"""What the engine refuses before it queues a request. No torch."""

from collections.abc import Iterable

from pressd.runtime.errors import RequestError
from pressd.runtime.params import SamplingParams
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import Request


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise RequestError, naming the field, for ids outside the vocabulary and for prompts without room for a token."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("prompt", "is empty; at least one token is needed")
    if not set(map(type, prompt)) <= {int}:
        raise RequestError("prompt", "holds something that is no whole number; give token ids")
    if len(prompt) >= info.max_context:
        raise RequestError("prompt", f"has {len(prompt)} tokens; the context of {info.max_context} leaves no room")
    for name, ids in (("prompt", prompt), ("stop_token_ids", request.stopping.stop_token_ids), *_ids(request.sampling)):
        tokens = tuple(ids)
        if tokens and not (min(tokens) >= 0 and max(tokens) < info.vocab_size):
            wrong = next(token for token in tokens if not 0 <= token < info.vocab_size)
            raise RequestError(name, f"token id {wrong} is outside the vocabulary of {info.vocab_size}")
    try:
        request.cache_salt.encode()
    except UnicodeEncodeError:
        raise RequestError("cache_salt", "is not valid Unicode") from None


def max_length(request: Request, info: EngineInfo) -> int:
    """Return the tokens that prompt and output may reach together."""
    limit = info.max_context
    if request.stopping.max_new_tokens is not None:
        limit = min(limit, len(request.prompt_token_ids) + request.stopping.max_new_tokens)
    return limit


def _ids(sampling: SamplingParams) -> Iterable[tuple[str, Iterable[int]]]:
    yield "logit_bias", (token for token, _ in sampling.logit_bias)
    yield "allowed_token_ids", sampling.allowed_token_ids or ()
    for index, word in enumerate(sampling.bad_words):
        yield f"bad_words[{index}]", word
