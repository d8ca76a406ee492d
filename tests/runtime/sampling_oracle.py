"""What the sampler's draws must follow, in float64 numpy with sorts and loops, and the test that compares them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.sampling import Sampler, TokenMasks

# A statistic this unlikely fails a test. There are fewer than 300 such tests, so that a right sampler, with other seeds
# than those written here, would fail one of them in 3e-7 of cases.
SIGNIFICANCE = 1e-9
CPU = torch.device("cpu")
EOS = 0


def edited(
    logits: np.ndarray, sampling: SamplingParams, tokens: Sequence[int], num_prompt: int, banned: Sequence[int] = ()
) -> np.ndarray:
    """Logits [V] after allowed ids, bias and penalties, for a sequence that has `tokens`."""
    result = np.array(logits, dtype=np.float64)
    for token in range(len(result)):
        if sampling.allowed_token_ids is not None and token not in sampling.allowed_token_ids:
            result[token] = -np.inf
        if token in banned:
            result[token] = -np.inf
        result[token] += dict(sampling.logit_bias).get(token, 0.0)
        if token in tokens:
            factor = sampling.repetition_penalty
            result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
        times = list(tokens[num_prompt:]).count(token)
        result[token] -= sampling.frequency_penalty * times + sampling.presence_penalty * (times > 0)
    return result


def until(order: Sequence[int], mass: np.ndarray, limit: float) -> list[int]:
    """The first tokens of an order, while what comes before them has less than `limit` of the mass."""
    kept, before = [], 0.0
    for token in order:
        if before >= limit:
            break
        kept.append(token)
        before += mass[token]
    return kept


def distribution(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Probabilities [V] of the next token under temperature, which is above 0, and filters."""
    scaled = logits / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    by_logit = sorted(range(len(p)), key=lambda token: (-logits[token], token))
    filters: list[Callable[[np.ndarray], Sequence[int]]] = [
        lambda p: by_logit[: sampling.top_k],
        lambda p: until(by_logit, p, sampling.top_p) if sampling.top_p < 1 else by_logit,
        lambda p: typical(p, sampling.typical_p) if sampling.typical_p < 1 else by_logit,
        lambda p: np.flatnonzero(p >= sampling.min_p * p.max()).tolist(),
    ]
    for keep in filters:
        kept = np.zeros_like(p)
        chosen = list(keep(p))
        kept[chosen] = p[chosen]
        p = kept / kept.sum()
    return p


def typical(p: np.ndarray, typical_p: float) -> list[int]:
    alive = np.flatnonzero(p)
    expected = -np.sum(p[alive] * np.log(p[alive]))
    distance = {token: abs(-np.log(p[token]) - expected) for token in alive.tolist()}
    return until(sorted(distance, key=lambda token: (distance[token], token)), p, typical_p)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of a chi-square test; cells expected less than 5 times are taken together. Counts where nothing may be give 0."""
    expected = probabilities * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    usual = expected >= 5
    cells = [(counts[usual], expected[usual])]
    if expected[~usual].sum() > 0:
        cells.append((counts[~usual].sum(keepdims=True), expected[~usual].sum(keepdims=True)))
    seen, mean = (np.concatenate(columns).astype(np.float64) for columns in zip(*cells, strict=True))
    freedom = len(seen) - 1
    if freedom == 0:
        return 1.0
    statistic = torch.tensor(((seen - mean) ** 2 / mean).sum())
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


def request_for(
    sampling: SamplingParams, prompt: Sequence[int] = (1,), stopping: StoppingParams | None = None
) -> Request:
    stopping = stopping or StoppingParams()
    return Request(request_id="x", prompt_token_ids=tuple(prompt), sampling=sampling, stopping=stopping)


def sampler_for(
    requests: Sequence[Request], histories: Sequence[Sequence[int]], vocab_size: int, index: int = 0
) -> Sampler:
    """A sampler whose row i holds the i-th request's sequence of this index, with these tokens.

    Its table has room for a few more, and no token's id where there is none yet.
    """
    table = torch.full((len(requests), max(map(len, histories), default=0) + 4), 2**40)
    sampler = Sampler(num_rows=len(requests), vocab_size=vocab_size, eos_token_ids=[EOS], device=CPU, token_table=table)
    for row, (request, history) in enumerate(zip(requests, histories, strict=True)):
        table[row, : len(history)] = torch.tensor(list(history), dtype=torch.int64)
        sampler.admit(row, request, index, len(history))
    return sampler


def count_draws(
    logits: torch.Tensor,
    sampling: SamplingParams,
    num_draws: int,
    *,
    tokens: Sequence[int] = (1,),
    num_prompt: int = 1,
    masks: torch.Tensor | None = None,
) -> np.ndarray:
    """How often each token is drawn from logits [V], [V]: by 200 seeds at many positions.

    Every draw is of the state that `tokens` leave: what it adds to the counts for penalties is taken back.
    """
    vocab_size, num_rows = len(logits), 200
    counts = np.zeros(vocab_size, dtype=np.int64)
    fields = {name: getattr(sampling, name) for name in SamplingParams.__dataclass_fields__}
    requests = [
        request_for(SamplingParams(**fields | {"seed": sampling.seed + row}), tokens[:num_prompt])
        for row in range(num_rows)
    ]
    sampler = sampler_for(requests, [tokens] * num_rows, vocab_size)
    rows = list(range(num_rows))
    penalties = (sampler._penalties._seen, sampler._penalties._counts)
    known = [counted.clone() for counted in penalties]
    allowed = None if masks is None else TokenMasks(rows, masks.expand(num_rows, -1))
    for step in range(-(-num_draws // num_rows)):
        positions = torch.full((num_rows,), len(tokens) + step)
        drawn = sampler.sample(logits.expand(num_rows, -1).contiguous(), rows, positions, allowed)
        assert drawn.finite.all()
        assert drawn.possible.all()
        counts += np.bincount(drawn.token_ids.numpy(), minlength=vocab_size)
        for counted, before in zip(penalties, known, strict=True):
            counted.copy_(before)
    return counts
