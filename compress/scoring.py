"""Log-likelihoods and greedy answers of single texts: what benchmarks ask of a model.

B sequences of a batch, T tokens of the longest, N predicted tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.greedy import greedy
from pressd.runtime.models import Decoder

# Tokens that run through a decoder at once, padding included, and numbers per temporary of the head's output.
_BATCH_TOKENS = 4096
_CHUNK_LOGITS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """How likely a continuation is after its context, in nats, and whether it is what greedy decoding says."""

    log_likelihood: float
    is_greedy: bool


def score(decoder: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
    """Score each (context, continuation), both at least one token; what is too long loses its beginning.

    Sequences of a batch are padded at their end, which no token before it sees.
    """
    most = decoder.config.max_context
    # The last token is predicted and not read.
    texts = [[*context, *continuation][-(most + 1) :] for context, continuation in pairs]
    counts = [min(len(pair[1]), len(text) - 1) for pair, text in zip(pairs, texts, strict=True)]
    found: dict[int, Scored] = {}
    for batch in _batches([len(text) - 1 for text in texts]):
        longest = max(len(texts[index]) for index in batch) - 1
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, index in enumerate(batch):
            ids_BT[row, : len(texts[index]) - 1] = torch.tensor(texts[index][:-1])
        hidden_BTH = decoder.hidden_states(ids_BT)
        for row, index in enumerate(batch):
            end, count = len(texts[index]) - 1, counts[index]
            targets_N = torch.tensor(texts[index][end + 1 - count :])
            found[index] = _score_one(decoder, hidden_BTH[row, end - count : end], targets_N)
    return [found[index] for index in range(len(pairs))]


def answer(
    decoder: Decoder, prompt: Sequence[int], most: int, decode: Callable[[list[int]], str], stops: Sequence[str]
) -> str:
    """Return the greedy text after a prompt, up to the first of `stops`, an end of text or `most` tokens.

    A prompt that leaves no room for `most` tokens in the context loses its beginning.
    """
    room = decoder.config.max_context - most
    if room < 1:
        raise ValueError(f"an answer of {most} tokens does not fit a context of {decoder.config.max_context}")
    ids: list[int] = []
    for token_B in greedy(decoder, torch.tensor([list(prompt)[-room:]]), most):
        token = int(token_B)
        if token in decoder.config.eos_token_ids:
            break
        ids.append(token)
        if any(stop in decode(ids) for stop in stops if stop):
            break
    text = decode(ids)
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]


def _score_one(decoder: Decoder, hidden_NH: Tensor, targets_N: Tensor) -> Scored:
    total, is_greedy = 0.0, True
    chunk = max(1, _CHUNK_LOGITS // decoder.config.vocab_size)
    for hidden, targets in zip(torch.split(hidden_NH, chunk), torch.split(targets_N, chunk), strict=True):
        log_p_NV = torch.log_softmax(decoder.lm_head(hidden).double(), dim=-1)
        total += float(log_p_NV.gather(-1, targets.unsqueeze(-1)).sum())
        is_greedy = is_greedy and bool((log_p_NV.argmax(-1) == targets).all())
    return Scored(log_likelihood=total, is_greedy=is_greedy)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of similar length, longest first, so that little is padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches
