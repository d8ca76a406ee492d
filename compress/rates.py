"""How fast this machine presses, measured now on a sample of random weights."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import Plan
from pressd.compress.press_linear import press_linear
from pressd.compress.recipe import KEEP
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Chain, LinearSpec, Packed, Sum

_SAMPLE_WEIGHTS = 1 << 20
# An SVD of a million weights takes seconds; of this many on the shorter side, a tenth of one.
_SAMPLE_SIDE = 512
# Columns in multiples of this suit every group size, also where a mask keeps half of them.
_COLUMNS = 256
_SAMPLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds per unit of `work` for each scheme, and per byte that is hashed."""

    seconds_per_work: dict[str, float]
    seconds_per_hashed_byte: float


def measure(plan: Plan, source: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Press a sample in each of the plan's schemes as pressing itself does it, from weights in `source`'s precision."""
    first: dict[str, GroupPlan] = {}
    for group in plan.groups():
        first.setdefault(group.scheme, group)
    sample = bytes(_SAMPLE_BYTES)
    return Rates(
        seconds_per_work={name: _seconds_per_work(group, source, plan.dtype, clock) for name, group in first.items()},
        seconds_per_hashed_byte=_seconds(lambda: hashlib.sha256(sample), clock) / _SAMPLE_BYTES,
    )


def work(spec: LinearSpec) -> float:
    """What seconds are proportional to: the weights, times the shorter side where there is an SVD to make."""
    size = spec.out_features * spec.in_features
    return float(size * min(spec.out_features, spec.in_features)) if _has_svd(spec) else float(size)


def _seconds_per_work(group: GroupPlan, source: torch.dtype, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    shape = _sample_shape(next(iter(group.specs.values())))
    spec = Packed.dense(shape, dtype) if group.scheme == KEEP else parse_scheme(group.scheme).spec(shape)
    original = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source)
    return _seconds(lambda: _press(original, dtype, spec), clock) / work(spec)


def _press(original: torch.Tensor, dtype: torch.dtype, spec: LinearSpec) -> None:
    weight = original.to(dtype)
    weight.aminmax()  # where pressing looks for NaN and infinity
    press_linear(original, weight, spec, input_scale=torch.ones(1, dtype=dtype))


def _seconds(do: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the second of two runs: the first brings code and memory in."""
    do()
    start = clock()
    do()
    return clock() - start


def _sample_shape(spec: LinearSpec) -> tuple[int, int]:
    """A smaller weight of about the same proportions that the spec's scheme fits."""
    out_features, in_features = spec.out_features, spec.in_features
    if _has_svd(spec):
        side = max(_SAMPLE_SIDE, *(rank + 1 for rank in _ranks(spec)))
        scale = min(1.0, side / min(out_features, in_features))
    else:
        scale = min(1.0, math.sqrt(_SAMPLE_WEIGHTS / (out_features * in_features)))
    columns = min(in_features, math.ceil(scale * in_features / _COLUMNS) * _COLUMNS)
    return math.ceil(scale * out_features), columns


def _has_svd(spec: LinearSpec) -> bool:
    return isinstance(spec, Chain | Sum)


def _ranks(spec: LinearSpec) -> Iterable[int]:
    if isinstance(spec, Chain):
        yield spec.rank
    elif isinstance(spec, Sum):
        yield spec.residual.rank
        yield from _ranks(spec.base)
