"""Rates: samples that each scheme fits, measured with a clock that is given."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pressd.compress import rates
from pressd.compress.plan import make_plan
from pressd.compress.rates import measure, work
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import parse_scheme


@given(
    scheme=st.sampled_from(
        [
            *("bf16", "w8a8", "w4a16g128", "w3a16", "sparse24:w4a16g128", "sparse24:w8a16", "lowrank1500:w8a16"),
            *(
                "lowrank128:w4a16g128",
                "w4a16g128+residual700",
                "sparse24:w4a16g64+residual8",
                "lowrank32:bf16+residual1",
            ),
        ]
    ),
    rows=st.integers(1, 30000),
    columns=st.integers(1, 300).map(lambda count: 32 * count) | st.integers(1, 9000),
)
def test_a_sample_fits_its_scheme_and_is_small(scheme: str, rows: int, columns: int) -> None:
    try:
        spec = parse_scheme(scheme).spec((rows, columns))
    except ValueError:
        assume(False)
    sampled = rates._sample_shape(spec)
    sample = parse_scheme(scheme).spec(sampled)  # raises if the scheme does not fit
    assert sampled[0] <= rows
    assert sampled[1] <= columns
    assert work(sample) <= work(spec)
    if not rates._has_svd(spec):
        # A million, and what rounding up a row and 256 columns may add.
        assert sampled[0] * sampled[1] <= (1 << 20) + 256 * sampled[0] + sampled[1]


def test_each_scheme_is_measured_once_and_divided_by_its_work(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe('[scheme]\n"*" = "w4a16g32"\n"layers.1.*" = "lowrank8:w8a16"\n', "recipe")
    pressed: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
    real = rates.press_linear

    def count(original: torch.Tensor, weight: torch.Tensor, spec: object, **options: torch.Tensor) -> object:
        pressed.append((tuple(original.shape), original.dtype, spec.is_dense))  # type: ignore[attr-defined]
        return real(original, weight, spec, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rates, "press_linear", count)
    ticks = itertools.count(step=3.0)
    found = measure(make_plan(Checkpoint.open(tiny_llama), recipe), torch.float32, clock=lambda: next(ticks))
    # A first run that is not timed, and one that is, between two readings of the clock: 3 s.
    assert pressed == [
        *[((97, 64), torch.float32, True)] * 2,
        *[((64, 64), torch.float32, False)] * 4,
    ]
    assert found.seconds_per_work == {
        "keep": 3 / (97 * 64),
        "w4a16g32": 3 / (64 * 64),
        "lowrank8:w8a16": 3 / (64 * 64 * 64),
    }
    assert found.seconds_per_hashed_byte == 3 / (16 << 20)
