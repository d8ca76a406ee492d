"""The draw of rows that nothing filters, and of greedy ones, on a GPU: three launches whatever the batch is.

The same tokens as runtime/sampling draws: arrival times of all tokens in float64, from the same noise. A row is divided
into chunks, a program each: their largest logits, then their first arrivals, then the first of those.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.variants import Variant

CHUNK = 4096
# Of runtime/sampling/noise.py: 2^32 over the golden ratio, and the two factors of the 32-bit mixer, as signed numbers.
GOLDEN = tl.constexpr(0x9E3779B1 - 2**32)
FIRST_FACTOR = tl.constexpr(0x7FEB352D)
SECOND_FACTOR = tl.constexpr(0x846CA68B - 2**32)
MIN_TEMPERATURE = tl.constexpr(1e-30)


@triton.jit
def mixed(spread, first, second):
    """Return 31 bits, from 0 up, of tokens int32 that are spread already, under two keys."""
    state = spread + first
    state = state ^ ((state >> 16) & 0xFFFF)
    state = (state * FIRST_FACTOR) ^ second
    state = state ^ ((state >> 15) & 0x1FFFF)
    state = state * SECOND_FACTOR
    return state ^ (state >> 16)


@triton.jit
def arrival_times(token, first, second):
    """Return standard exponentials, float64, of tokens int32: as `exact_times` of noise.py."""
    spread = token * GOLDEN
    leading = mixed(spread, first, second).to(tl.float64)
    following = (mixed(spread, second, first) >> 11).to(tl.float64)
    uniform = (leading + (following + 0.5) * 9.5367431640625e-07) * 4.656612873077393e-10
    return -tl.log(1.0 - uniform)  # the difference is exact


@triton.jit
def find_peaks(logits, maxima, first_ids, vocab, num_chunks, stride, CHUNK: tl.constexpr):
    """Of each chunk of a row, the largest logit (NaN if there is one) and the first token that has it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    values = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    is_nan = values != values
    largest = tl.max(tl.where(is_nan, float("-inf"), values), 0)
    first = tl.min(tl.where((values == largest) & inside, token, vocab - 1), 0)
    spoilt = tl.max(is_nan.to(tl.int32), 0) > 0
    tl.store(maxima + row * num_chunks + chunk, tl.where(spoilt, float("nan"), largest))
    tl.store(first_ids + row * num_chunks + chunk, first)


@triton.jit
def peak_of(maxima, row, num_chunks, CHUNKS: tl.constexpr):
    """Return the largest logit of a row, NaN if one of its chunks has one, and the first chunk that has it."""
    chunk = tl.arange(0, CHUNKS)
    own = tl.load(maxima + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    is_nan = own != own
    largest = tl.max(tl.where(is_nan, float("-inf"), own), 0)
    first = tl.min(tl.where((own == largest) & (chunk < num_chunks), chunk, num_chunks - 1), 0)
    spoilt = tl.max(is_nan.to(tl.int32), 0) > 0
    return tl.where(spoilt, float("nan"), largest), first


@triton.jit
def run_race(
    logits,
    keys,
    temperatures,
    maxima,
    times,
    winners,
    vocab,
    num_chunks,
    stride,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of each chunk of a row that is drawn, the first token to arrive and when."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        peak, _ = peak_of(maxima, row, num_chunks, CHUNKS)
        is_finite = (peak == peak) & (tl.abs(peak) != float("inf"))
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < vocab
        values = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float64)
        above = values - tl.where(is_finite, peak, 0.0).to(tl.float64)
        weights = tl.exp(above / tl.maximum(temperature, MIN_TEMPERATURE))
        time = arrival_times(token, tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1))
        arrival = tl.where(inside & (weights > 0), time / tl.where(weights > 0, weights, 1.0), float("inf"))
        first = tl.min(arrival, 0)
        winner = tl.min(tl.where((arrival == first) & inside, token, vocab - 1), 0)
        tl.store(times + row * num_chunks + chunk, first)
        tl.store(winners + row * num_chunks + chunk, winner)


@triton.jit
def finish(temperatures, maxima, first_ids, times, winners, peaks, token_ids, num_chunks, CHUNKS: tl.constexpr):
    """Of each row, its largest logit and its token."""
    row = tl.program_id(0).to(tl.int64)
    peak, best = peak_of(maxima, row, num_chunks, CHUNKS)
    tl.store(peaks + row, peak)
    if tl.load(temperatures + row) > 0:
        chunk = tl.arange(0, CHUNKS)
        inside = chunk < num_chunks
        arrival = tl.load(times + row * num_chunks + chunk, mask=inside, other=float("inf"))
        first = tl.min(arrival, 0)
        winner = tl.min(tl.where((arrival == first) & inside, chunk, num_chunks - 1), 0)
        tl.store(token_ids + row, tl.load(winners + row * num_chunks + winner).to(tl.int64))
    else:
        tl.store(token_ids + row, tl.load(first_ids + row * num_chunks + best).to(tl.int64))


def draw(logits: torch.Tensor, keys: torch.Tensor, temperatures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens int64 [B] and the largest logits float32 [B] of logits [B, V]; one that is NaN spoils its row's.

    `keys` int32 [B, 2] are a draw's (`position_keys`); rows of `temperatures` float64 [B] that are 0 are greedy.
    """
    assert logits.dtype != torch.float64, "logits are compared in float32"
    num_rows, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, CHUNK)
    chunks = max(2, triton.next_power_of_2(num_chunks))

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    peaks, token_ids = empty(torch.float32), empty(torch.int64)
    if num_rows == 0:
        return token_ids, peaks
    maxima, first_ids = empty(torch.float32, num_chunks), empty(torch.int32, num_chunks)
    times, winners = empty(torch.float64, num_chunks), empty(torch.int32, num_chunks)
    grid, stride = (num_rows, num_chunks), logits.stride(0)
    find_peaks[grid](logits, maxima, first_ids, vocab, num_chunks, stride, CHUNK=CHUNK, num_warps=8)
    run_race[grid](
        logits,
        keys,
        temperatures,
        maxima,
        times,
        winners,
        vocab,
        num_chunks,
        stride,
        CHUNK=CHUNK,
        CHUNKS=chunks,
        num_warps=8,
    )
    finish[(num_rows,)](
        temperatures, maxima, first_ids, times, winners, peaks, token_ids, num_chunks, CHUNKS=chunks, num_warps=1
    )
    return token_ids, peaks


def variants() -> Iterator[Variant]:
    numbers = {"vocab": "i32", "num_chunks": "i32", "stride": "i32"}
    found = {"maxima": "*fp32", "first_ids": "*i32"}
    race = {"times": "*fp64", "winners": "*i32"}
    for kind in ("*fp32", "*bf16"):
        yield Variant(
            name=f"find_peaks {kind}",
            kernel=find_peaks,
            signature={"logits": kind} | found | numbers,
            constants={"CHUNK": CHUNK},
            num_warps=8,
            aligned=("vocab", "stride"),
        )
        yield Variant(
            name=f"run_race {kind}",
            kernel=run_race,
            signature={"logits": kind, "keys": "*i32", "temperatures": "*fp64", "maxima": "*fp32"} | race | numbers,
            constants={"CHUNK": CHUNK, "CHUNKS": 32},
            num_warps=8,
            aligned=("vocab", "stride"),
        )
    yield Variant(
        name="finish",
        kernel=finish,
        signature={"temperatures": "*fp64"}
        | found
        | race
        | {"peaks": "*fp32", "token_ids": "*i64", "num_chunks": "i32"},
        constants={"CHUNKS": 32},
        num_warps=1,
    )
