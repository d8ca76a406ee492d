"""What filters keep: exactly what sorts in float64 keep, by either way, with ties; transformers' warpers agree."""

from dataclasses import replace

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.params import SamplingParams
from pressd.runtime.sampling import blocks, filters, noise
from pressd.runtime.sampling.plan import Admitted, Filters, Group
from pressd.runtime.sampling.race import Race
from pressd.runtime.sampling.sampler import draw, keep_filtered
from pressd.runtime.sampling.scratch import Scratch

CPU = torch.device("cpu")
VOCABS = (1, 31, 32, 33, 97, 4099)


def prepared(logits: torch.Tensor, sampling: SamplingParams, position: int = 0) -> tuple[Race, Group]:
    num_rows, vocab_size = logits.shape
    used = Filters.of(sampling, vocab_size)
    members = [
        Admitted(sampling=sampling, sequence_key=noise.sequence_key(5, row), filters=used, bans=None, biases=None)
        for row in range(num_rows)
    ]
    group = Group(used, list(range(num_rows)), members, CPU, is_batch=True)
    keys = noise.position_keys(group.sequence_keys, torch.full((num_rows,), position))
    spread = noise.spread_tokens(vocab_size, CPU)
    return Race.begin(logits, logits.amax(-1), group.temperature, keys, spread, Scratch(CPU)), group


def kept(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    race, group = prepared(logits, sampling)
    weights = race.weights(same_everywhere=True)
    keep_filtered(weights, race, group, slice(None))
    return weights > 0


def some_logits(vocab_size: int, kind: str, num_rows: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 2 * torch.randn(num_rows, vocab_size, generator=generator)
    if kind == "ties":
        return logits.mul(2).round() / 4
    if kind == "forbidden":
        logits[torch.rand(logits.shape, generator=generator) < 0.4] = float("-inf")
        logits[:, -1] = 1.0
    return logits.double() if kind == "double" else logits


SETTINGS = {
    "top_k": SamplingParams(top_k=7),
    "top_k of thousands": SamplingParams(top_k=1500),
    "top_p": SamplingParams(top_p=0.8, temperature=1.4),
    "top_p, little": SamplingParams(top_p=0.03),
    "top_p, much": SamplingParams(top_p=0.9999),
    "min_p": SamplingParams(min_p=0.07),
    "typical_p": SamplingParams(typical_p=0.55),
    "typical_p, hot": SamplingParams(typical_p=0.2, temperature=3.0),
    "top_k, top_p": SamplingParams(top_k=20, top_p=0.6),
    "top_p, typical_p": SamplingParams(top_p=0.9, typical_p=0.7),
    "all": SamplingParams(top_k=500, top_p=0.95, typical_p=0.9, min_p=0.01, temperature=0.8),
}


# Without typical_p on ties: two logits as far from the expected surprise on either side tie in exact arithmetic alone.
KINDS = ("distinct", "ties", "forbidden", "double")
KEPT = [(name, kind) for name in SETTINGS for kind in KINDS if kind != "ties" or SETTINGS[name].typical_p == 1]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize(("setting", "kind"), KEPT)
def test_exactly_the_right_tokens_are_kept(setting: str, vocab_size: int, kind: str) -> None:
    """With ties, those of the lowest ids. In float32 a sum may be off by some 1e-6 of all, and no case is so near."""
    logits = some_logits(vocab_size, kind)
    wanted = [oracle.distribution(row, SETTINGS[setting]) > 0 for row in logits.double().numpy()]
    np.testing.assert_array_equal(kept(logits, SETTINGS[setting]).numpy(), np.array(wanted))


def test_equally_likely_tokens_enter_by_id() -> None:
    logits = torch.zeros(1, 100)
    assert kept(logits, SamplingParams(top_k=3)).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert kept(logits, SamplingParams(top_k=40, top_p=0.25)).nonzero()[:, 1].tolist() == list(range(10))
    assert kept(logits, SamplingParams(typical_p=0.5)).nonzero()[:, 1].tolist() == list(range(50))
    logits[0, 90] = 1e-6
    assert kept(logits, SamplingParams(top_k=3)).nonzero()[:, 1].tolist() == [0, 1, 90]


def test_the_likeliest_is_always_kept() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for sampling in (SamplingParams(top_p=1e-12), SamplingParams(top_k=1), SamplingParams(min_p=1.0)):
        assert kept(logits, sampling).tolist() == [[False, True, False]]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", ["distinct", "ties", "forbidden"])
def test_drawing_and_looking_is_drawing_from_what_is_kept(kind: str, vocab_size: int) -> None:
    """The CPU's way for top_p and the GPU's give the same token."""
    logits = some_logits(vocab_size, kind, num_rows=9)
    for sampling in (
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.02),
        SamplingParams(top_p=0.5, min_p=0.2, temperature=1.5),
        SamplingParams(top_k=12, top_p=0.7),
        SamplingParams(top_k=12, top_p=0.99, min_p=0.01),
    ):
        for position in range(12):
            race, group = prepared(logits, sampling, position)
            asking = draw(race, group, slice(None), may_ask=True)
            race, group = prepared(logits, sampling, position)
            assert torch.equal(asking, draw(race, group, slice(None), may_ask=False))


@pytest.mark.parametrize("vocab_size", [*VOCABS, 32000])
def test_the_winner_is_the_first_of_all_in_float64(vocab_size: int) -> None:
    for kind in ("distinct", "ties", "forbidden"):
        logits = some_logits(vocab_size, kind)
        for temperature in (0.05, 1.0, 20.0):
            race, _ = prepared(logits, SamplingParams(temperature=temperature), position=vocab_size)
            winner = race.winner(race.weights(same_everywhere=False))
            times = noise.exact_times(race.keys, torch.arange(vocab_size).expand(len(logits), -1))
            arrival = times.log() - logits.double() / temperature
            assert torch.equal(winner, arrival.argmin(-1))


@pytest.mark.parametrize("vocab_size", [97, 4099, 33001])
def test_weights_for_sums_have_the_same_bits_wherever_a_row_is(vocab_size: int) -> None:
    logits = some_logits(vocab_size, "distinct", num_rows=1)
    alone, _ = prepared(logits, SamplingParams(temperature=0.7))
    wanted = alone.weights(same_everywhere=True)[0]
    for num_rows in (2, 3, 5, 8):
        race, _ = prepared(logits.repeat(num_rows, 1), SamplingParams(temperature=0.7))
        assert all(torch.equal(row, wanted) for row in race.weights(same_everywhere=True))


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_blocks_find_what_a_stable_sort_finds(vocab_size: int) -> None:
    logits = some_logits(vocab_size, "ties")
    order = logits.sort(dim=-1, descending=True, stable=True)
    for num in {1, min(5, vocab_size), min(40, vocab_size), vocab_size}:
        values, ids = blocks.largest(logits, num)
        assert torch.equal(values, order.values[:, :num])
        assert torch.equal(ids, order.indices[:, :num])
    assert torch.equal(blocks.first_maximum(logits, blocks.block_maxima(logits)), order.indices[:, 0])
    marks = (logits > 0).float()
    for row, row_marks in enumerate(marks):
        ids = row_marks.nonzero()[:, 0]
        for n in range(1, len(ids) + 1, 7):
            every = torch.full((len(marks),), float(n), dtype=torch.float64)
            assert blocks.nth_true(marks, every)[row] == ids[n - 1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_threshold_is_that_of_a_search_through_all(data: st.DataObject) -> None:
    number = st.floats(-(2.0**120), 2.0**120, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1e-45, 1e-45, 2.0**127])
    keys = torch.tensor([data.draw(st.lists(number, min_size=1, max_size=40))])
    limit = torch.tensor([data.draw(st.floats(0.1, 50))], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        wide = keys.to(dtype)
        found = filters._threshold(wide, None, limit, Scratch(CPU))[0, 0]
        fits = [key for key in wide[0].tolist() if (wide > key).sum() < limit]
        everything = len(wide[0]) < limit
        assert found == (float("-inf") if everything else min(fits))


def by_transformers(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    from transformers.generation import logits_process as theirs

    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    steps: list[theirs.LogitsProcessor] = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.typical_p < 1:
        steps.append(theirs.TypicalLogitsWarper(sampling.typical_p))
    if sampling.min_p:
        steps.append(theirs.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        logits = step(ids, logits)
    return logits.isfinite()


@pytest.mark.parametrize("vocab_size", [31, 97, 4099])
@pytest.mark.parametrize("setting", SETTINGS)
def test_transformers_keeps_the_same(setting: str, vocab_size: int) -> None:
    """Where no tokens tie: theirs keep all that tie with the last, or any of them; ours keep the lowest ids."""
    sampling = replace(SETTINGS[setting], temperature=0.7)
    logits = some_logits(vocab_size, "double")
    assert torch.equal(kept(logits, sampling), by_transformers(logits, sampling))


def test_a_filter_off_by_one_is_seen() -> None:
    logits = some_logits(97, "distinct")
    right = kept(logits, SamplingParams(top_k=7))
    assert not torch.equal(right, by_transformers(logits, SamplingParams(top_k=8)))
    near = [kept(logits, SamplingParams(top_p=p)) for p in (0.8, 0.82)]
    assert not torch.equal(near[0], by_transformers(logits, SamplingParams(top_p=0.82)))
    assert torch.equal(near[1], by_transformers(logits, SamplingParams(top_p=0.82)))
