"""How long an artifact says the same as its source: the first token in which their greedy continuations differ.

N prompts, T tokens of a prompt, G new tokens.
"""

import math

import torch
from torch import Tensor

from pressd.compress.greedy import greedy
from pressd.runtime.models import Decoder

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 64


def choose_prompts(ids_RT: Tensor) -> Tensor:
    """Return the beginnings of rows that lie evenly over the text, [N, T]; fewer or shorter where the rows are."""
    rows = min(PROMPTS, len(ids_RT))
    return ids_RT[[index * len(ids_RT) // rows for index in range(rows)], :PROMPT_TOKENS]


def continuations(decoder: Decoder, prompts_NT: Tensor) -> Tensor:
    """Return the greedy continuation [N, G] of every prompt."""
    return torch.stack(list(greedy(decoder, prompts_NT, NEW_TOKENS)), dim=1)


def first_differences(ours_NG: Tensor, theirs_NG: Tensor) -> Tensor:
    """Return the index of the first token that differs, int64 [N]; G where none does.

    After that token the two read different text, and nothing that follows says more.
    """
    same = (ours_NG == theirs_NG).long().cumprod(dim=1)
    return same.sum(dim=1)


def summarise_divergence(first_N: Tensor, prompt_tokens: int, new_tokens: int = NEW_TOKENS) -> dict[str, object]:
    """Return the `divergence` entry of a measurement. Prompts that never diverge count as `new_tokens`."""
    values = first_N.double()
    num = len(values)
    return {
        "prompts": num,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "mean": float(values.mean()),
        "median": float(values.quantile(0.5)),
        "never": int((first_N == new_tokens).sum()),
        "stderr": {"mean": float(values.std()) / math.sqrt(num) if num > 1 else None},
    }
