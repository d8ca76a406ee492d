"""From logits to tokens, with noise that depends on nothing but the request.

The noise of a draw is a hash of (seed, position, token), and the Gumbel-max trick picks the token: argmax of logits /
temperature + Gumbel noise is a draw from the softmax (Maddison et al. 2014, https://arxiv.org/abs/1411.0030). So a
request's tokens do not depend on its neighbours in the batch, on arrival or on restarts.
"""

from collections.abc import Sequence

import torch

from pressd.runtime.request import SamplingParams

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw one token per row of logits [rows, vocab]; `positions` are the drawn tokens' places in their sequences."""
    drawn = torch.argmax(logits, dim=-1)
    rows = [row for row, param in enumerate(params) if param.temperature > 0]
    if rows:
        chosen = [params[row] for row in rows]
        scaled = logits[rows].double() / _column([param.temperature for param in chosen], logits.device)
        scaled = mask_below_top_p(scaled, [param.top_p for param in chosen])
        noise = gumbel(
            [param.seed for param in chosen], [positions[row] for row in rows], logits.size(1), logits.device
        )
        drawn[rows] = torch.argmax(scaled + noise, dim=-1)
    return [int(token) for token in drawn.tolist()]


def mask_below_top_p(scaled: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Return logits [rows, vocab] with -inf outside the smallest set of likeliest tokens whose mass reaches top_p.

    Nucleus sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751); equally likely tokens enter by their id.
    """
    if all(p >= 1.0 for p in top_p):
        return scaled
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    limit = _column(top_p, scaled.device)
    # A row that keeps everything must not lose a tail to rounding of the running sum.
    outside = (before >= limit) & (limit < 1.0)
    return scaled.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))


def gumbel(seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return standard Gumbel noise, float64 [rows, vocab], a function of seed, position and token id alone."""
    keys = [_mix(_mix(seed + _GOLDEN) + position * _GOLDEN) for seed, position in zip(seeds, positions, strict=True)]
    counters = torch.arange(1, vocab_size + 1, device=device) * _signed(_GOLDEN)
    state = torch.tensor([_signed(key) for key in keys], device=device)[:, None] + counters
    for shift, factor in _MIX:
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    state = state ^ _shift_right(state, 31)
    uniform = (_shift_right(state, 11).double() + 0.5) * 2.0**-53  # never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on Python integers."""
    value &= _MASK
    for shift, factor in _MIX:
        value = (value ^ value >> shift) * factor & _MASK
    return value ^ value >> 31


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, the only 64-bit type torch multiplies; it wraps around."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _shift_right(state: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical shift right of signed 64-bit integers."""
    return (state >> shift) & ((1 << (64 - shift)) - 1)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
