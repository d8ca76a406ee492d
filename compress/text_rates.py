"""How long pressing with text takes on a CPU: products are counted, and all else is measured now, on samples.

T tokens, a fused group of R x C, multiplications and additions in pairs. Every token meets qkv, o and down once and
gate_up twice (once for the inputs of down, once with them), and again in the source with GPTQ's `correct`; awq asks for
the inputs of o and down once more. With `round` the source runs beside as well; every step takes some rows forward and
back, which is three times forward, all rows are evaluated before and after, and go through the layer once more.
A gram takes T C^2 (twice with `correct`). GPTQ takes R C^2 for half of a sweep,
four for each round of descent, two for its errors and one for matching; a Cholesky factor and what is solved with it
run at about half the speed of products: 1.3 C^3 for the inverse's, 2.3 C^3 for matching. What is left of a sample's
time, a column at a time, is proportional to R C, or to C where R is small: samples have the group's own rows, up to a
thousand.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.equalise_layer import rounding
from pressd.compress.group_plan import GroupPlan
from pressd.compress.pass_options import Awq, Gptq, Round
from pressd.compress.passes.equalize import search_scales
from pressd.compress.plan import Plan
from pressd.compress.press_group import clips
from pressd.compress.quantise_group import quantise
from pressd.compress.statistics import Statistics
from pressd.runtime.artifact.families import LM_HEAD
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.models.config import DecoderConfig

_SAMPLE_TOKENS, _SAMPLE_SIDE = 2048, 1024
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 1024, 256
_VISITS = {"qkv": 1, "o": 1, "gate_up": 2, "down": 1}
_SEARCH_VISITS = {"qkv": 1, "gate_up": 1}
_STEP_PASSES, _OTHER_PASSES = 3, 3
_SWEEP, _DESCENT, _ERRORS = 0.5, 4, 2
_INVERSE_CUBES, _MATCHING_CUBES = 1.3, 2.3


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRates:
    """Seconds per pair of multiplication and addition in a product, and per column of each kind of group.

    The kinds are `scheme rows`; columns take what no product takes.
    """

    seconds_per_product: float
    seconds_per_column: dict[str, float]


def measure_text(plan: Plan, clock: Callable[[], float] = time.perf_counter) -> TextRates:
    """Measure products, and round a sample of each kind of group as pressing does."""
    x = torch.randn(_SAMPLE_TOKENS, _SAMPLE_SIDE, generator=torch.Generator().manual_seed(0))
    each = _seconds(lambda: x.T @ x, clock) / (_SAMPLE_TOKENS * _SAMPLE_SIDE**2)
    columns: dict[str, float] = {}
    for group in plan.groups():
        if group.is_rounded_with_text and _kind(group) not in columns:
            columns[_kind(group)] = _seconds_per_column(group, plan, each, clock)
    return TextRates(seconds_per_product=each, seconds_per_column=columns)


def text_seconds(plan: Plan, config: DecoderConfig, rates: TextRates, tokens: int, seq_len: int) -> float:
    """Return the seconds that the text's way through the model and rounding with it take."""
    sides = 2 if plan.runs_source else 1
    awq = plan.recipe.pass_of(Awq) is not None
    tuned = _tuned_tokens(plan, tokens, seq_len)
    products = columns = 0.0
    for group in plan.groups():
        size, wide = math.prod(group.group.shape), group.group.shape[1]
        kind = group.group.kind
        if kind in _VISITS:
            products += tokens * size * (_VISITS[kind] * sides + awq * _SEARCH_VISITS.get(kind, 0)) + tuned * size
        if kind == "o":  # attention: scores and values, half of the square being masked
            products += (tokens * (sides + awq) + tuned) * seq_len * config.num_heads * config.head_dim
        if group.is_rounded_with_text:
            grams = 1 if group.group.name == LM_HEAD else 1 + plan.matches_source + awq
            products += tokens * wide**2 * grams + _products(group, plan, *group.group.shape)
            columns += rates.seconds_per_column[_kind(group)] * wide
    return products * rates.seconds_per_product + columns


def _tuned_tokens(plan: Plan, tokens: int, seq_len: int) -> int:
    """Tokens that go through each layer for the sake of tuning it, in passes forward."""
    options = plan.recipe.pass_of(Round)
    if options is None:
        return 0
    step = min(options.rows * seq_len, tokens)
    return _STEP_PASSES * options.steps * step + _OTHER_PASSES * tokens


def _products(group: GroupPlan, plan: Plan, rows: int, columns: int) -> float:
    """Pairs of multiplications and additions in rounding rows x columns."""
    gptq, awq = plan.recipe.pass_of(Gptq), plan.recipe.pass_of(Awq)
    square = rows * columns**2
    pairs = float(_ERRORS * square)
    if awq is not None:
        pairs += (awq.steps + 1) * square
    if gptq is not None:
        matches = gptq.correct and group.group.name != LM_HEAD
        pairs += square * (_SWEEP + _DESCENT * gptq.sweeps + matches)
        pairs += columns**3 * (_INVERSE_CUBES + matches * _MATCHING_CUBES)
    return pairs


def _seconds_per_column(group: GroupPlan, plan: Plan, each: float, clock: Callable[[], float]) -> float:
    """What rounding a sample takes beyond its products, for a column of all the group's rows."""
    all_rows, all_columns = group.group.shape
    rows, columns = min(all_rows, _SAMPLE_ROWS), min(all_columns, _SAMPLE_COLUMNS)
    spec = parse_scheme(group.scheme).spec((rows, columns))
    assert isinstance(spec, Packed)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(2 * columns, columns, generator=generator)
    gram = x.T @ x / len(x)
    seconds = _seconds(lambda: _round(weight, gram, spec, plan), clock)
    return max(0.0, seconds - each * _products(group, plan, rows, columns)) / columns * all_rows / rows


def _round(weight: Tensor, gram: Tensor, spec: Packed, plan: Plan) -> None:
    awq = plan.recipe.pass_of(Awq)
    if awq is not None:
        search_scales(gram.diagonal().sqrt(), gram, weight, rounding([spec], plan.dtype), steps=awq.steps)
    statistics = Statistics(tokens=1, gram=gram, cross=gram if plan.matches_source else None)
    quantise(weight, [spec], statistics, plan.recipe.pass_of(Gptq), clip=clips(plan), dtype=plan.dtype)


def _kind(group: GroupPlan) -> str:
    return f"{group.scheme} {group.group.shape[0]}"


def _seconds(do: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the second of two runs: the first brings code and memory in."""
    do()
    start = clock()
    do()
    return clock() - start
