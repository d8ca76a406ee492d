"""Counter-based noise: what a draw adds is a hash of (seed, sequence index, position, token id) and nothing else.

So a request's tokens depend neither on its neighbours in the batch nor on arrival, restarts or speculation (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The first three are mixed to 64 bits, once per row; those are
the two 32-bit keys of a hash of the token id in 32-bit arithmetic, which vector units and GPUs have.

Legend: B rows, V vocabulary, N tokens of a row.
"""

import torch

from pressd.runtime.sampling.scratch import Scratch

_MASK64 = 2**64 - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
# 2^32 over the golden ratio, odd: tokens are spread before they meet a key. Shifts and factors are those of "lowbias32"
# (https://nullprogram.com/blog/2018/07/31/), found by search for the least bias of a two-round 32-bit mixer.
_GOLDEN32 = 0x9E3779B1 - 2**32
_FACTORS32 = (0x7FEB352D, 0x846CA68B - 2**32)


def sequence_key(seed: int, index: int) -> int:
    """Return 64 bits, signed, for the index-th sequence of a request with this seed (below 2^64)."""
    return _signed(_mix(_mix(seed + _GOLDEN64) + (index + 1) * _GOLDEN64))


def position_keys(sequence_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return two 32-bit keys per row, int32 [B, 2], from sequence keys and positions, int64 [B] each."""
    state = sequence_keys + (positions + 1) * _signed(_GOLDEN64)
    for shift, factor in _MIX64:
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    state = state ^ _shift_right(state, 31)
    return state.view(torch.int32).view(-1, 2)


def spread_tokens(vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return what `rough_times` starts from, int32 [V]: constant for a vocabulary."""
    return torch.arange(vocab_size, dtype=torch.int32, device=device) * _GOLDEN32


def exact_times(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return independent standard exponentials, float64 [B, N], of 51 random bits, for tokens int64 [B, N].

    A hash under the row's keys gives the 31 leading bits of a uniform number, a second under the keys in reverse the 20
    that follow, then comes one half of the last: it is never 0 or 1, and exact in float64.
    """
    first, second = keys.narrow(1, 0, 1), keys.narrow(1, 1, 1)
    spread = tokens.to(torch.int32) * _GOLDEN32
    leading = _hash(spread + first, second, torch.empty_like(spread))
    following = _hash(spread + second, first, torch.empty_like(spread)) >> 11
    uniform = (leading.double() + (following.double() + 0.5) * 2.0**-20) * 2.0**-31
    return -torch.log1p(-uniform)


def rough_times(keys: torch.Tensor, spread: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return minus `exact_times` of the whole vocabulary, float32 [B, V], to a few units of the last place.

    It errs to the early side where it errs by more: see the comments.
    """
    shape = (keys.shape[0], spread.shape[0])
    state = scratch.take("hash", shape, torch.int32)
    torch.add(spread, keys.narrow(1, 0, 1), out=state)
    leading = _hash(state, keys.narrow(1, 1, 1), scratch.take("shifted", shape, torch.int32))
    times = scratch.take("times", shape)
    times.copy_(leading)
    # The bits that follow are unknown here and taken for the least they can be, and the largest numbers, which would
    # round to 1, are shrunk: both make a token earlier than it is, so that none is overlooked.
    return times.add_(2.0**-21).mul_(-(1 - 2.0**-20) * 2.0**-31).log1p_()


def _hash(state: torch.Tensor, key: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
    """Mix int32 [B, N] in place to 31 bits, from 0 up; `key` int32 [B, 1] enters between the rounds.

    Had all of a row's key entered before the first round, then rows whose keys differ by that of two tokens would
    share their noise, shifted. `shifted` is memory of the state's shape.
    """
    _xor_shift(state, 16, shifted)
    state.mul_(_FACTORS32[0]).bitwise_xor_(key)
    _xor_shift(state, 15, shifted)
    state.mul_(_FACTORS32[1])
    # An arithmetic shift: every bit that moves in equals the sign, which becomes 0; each of the 2^31 results has two
    # origins, a number and its complement.
    torch.bitwise_right_shift(state, 16, out=shifted)
    return state.bitwise_xor_(shifted)


def _xor_shift(state: torch.Tensor, shift: int, shifted: torch.Tensor) -> None:
    torch.bitwise_right_shift(state, shift, out=shifted)
    state.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on Python integers."""
    value &= _MASK64
    for shift, factor in _MIX64:
        value = (value ^ value >> shift) * factor & _MASK64
    return value ^ value >> 31


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, the only 64-bit type torch multiplies; it wraps around."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(state: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical shift right of signed 64-bit integers."""
    return (state >> shift) & ((1 << (64 - shift)) - 1)
