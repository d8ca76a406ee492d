"""Forecasts of runs that read text: work at rates that are given, and memory against what a process takes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pressd.compress import text_memory
from pressd.compress.forecast import TEXT_LIBRARY_BYTES, make_forecast
from pressd.compress.forecast_text import show_forecast
from pressd.compress.plan import Plan, make_plan
from pressd.compress.rates import Rates
from pressd.compress.recipe import Recipe, parse_recipe, recipe_of_scheme
from pressd.compress.text_memory import TextMemory
from pressd.compress.text_rates import TextRates, measure_text, text_seconds
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import decoder_config

TEXT: dict[str, str | int] = {"tokens": 512, "seq_len": 128}


def plan_of(source: Path, recipe: Recipe) -> Plan:
    return make_plan(Checkpoint.open(source), recipe)


def seconds(source: Path, passes: str, product: float, column: float, scheme: str = "w8a8") -> float:
    recipe = parse_recipe(f'{passes}\n[scheme]\n"*" = "{scheme}"\n', "recipe")
    plan = plan_of(source, recipe)
    rates = TextRates(
        seconds_per_product=product, seconds_per_column={f"w8a8 {rows}": column for rows in (64, 128, 320)}
    )
    return text_seconds(plan, decoder_config(Checkpoint.open(source)), rates, 512, 128)


# A layer of tiny_llama: rows and columns of qkv, o, gate_up, down; and how often each token meets the group.
GROUPS = ((128, 64, 1), (64, 64, 1), (320, 64, 2), (64, 160, 1))


def test_products_are_counted(tiny_llama: Path) -> None:
    forward = 512 * sum(rows * columns * visits for rows, columns, visits in GROUPS) + 512 * 128 * 64
    grams = 512 * sum(columns**2 for _, columns, _ in GROUPS)
    squares = sum(rows * columns**2 for rows, columns, _ in GROUPS)
    cubes = sum(columns**3 for _, columns, _ in GROUPS)
    plain = '[[pass]]\nuse = "gptq"\nsweeps = 0\ncorrect = false'
    # Two for the errors, half of one for the sweep.
    assert seconds(tiny_llama, plain, 1.0, 0.0) == pytest.approx(2 * (forward + grams + 2.5 * squares + 1.3 * cubes))
    # The source runs beside: all of the text's way twice, a cross gram, and what is matched; four rounds of descent.
    both = 2 * (2 * forward + 2 * grams + (2.5 + 16 + 1) * squares + 3.6 * cubes)
    assert seconds(tiny_llama, '[[pass]]\nuse = "gptq"', 1.0, 0.0) == pytest.approx(both)
    # awq alone: qkv, attention and gate_up once more, a gram more, an error for each of 21 scales.
    again = 512 * (128 * 64 + 320 * 64) + 512 * 128 * 64
    searched = 2 * (forward + again + 2 * grams + (2 + 21) * squares)
    assert seconds(tiny_llama, '[[pass]]\nuse = "awq"', 1.0, 0.0) == pytest.approx(searched)
    # round: the source beside, grams of one side more, and all of a layer for 3 x 5 x 2 rows and 3 times all rows.
    once = sum(rows * columns for rows, columns, _ in GROUPS) + 128 * 64
    tuned = (3 * 5 * 2 * 128 + 3 * 512) * once
    passes = '[[pass]]\nuse = "rtn"\n[[pass]]\nuse = "round"\nsteps = 5\nrows = 2'
    expected = 2 * (2 * forward + grams + 2 * squares + tuned)
    assert seconds(tiny_llama, passes, 1.0, 0.0) == pytest.approx(expected)
    # Columns, by the rows that they have.
    assert seconds(tiny_llama, plain, 0.0, 3.0) == 2 * 3.0 * sum(columns for _, columns, _ in GROUPS)


def test_a_sample_is_rounded_for_each_kind_of_group(tiny_llama: Path) -> None:
    plan = plan_of(tiny_llama, recipe_of_scheme("w4a16g32", ("gptq",)))
    ticks = itertools.count(step=3.0)
    found = measure_text(plan, clock=lambda: next(ticks))
    assert found.seconds_per_product == 3 / (2048 * 1024**2)
    # o and down have 64 rows both. Columns take the time of the sample, less that of its products (a millionth of it).
    assert found.seconds_per_column.keys() == {"w4a16g32 128", "w4a16g32 64", "w4a16g32 320"}
    assert found.seconds_per_column["w4a16g32 320"] == pytest.approx(3 / 64, rel=0.02)


@pytest.mark.parametrize(("scheme", "passes"), [("w4a16g32-asym", ("awq", "gptq")), ("w8a8-static", ("rtn", "static"))])
def test_a_plan_says_what_text_it_will_read(tiny_llama: Path, scheme: str, passes: tuple[str, ...]) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plan = make_plan(checkpoint, recipe_of_scheme(scheme, passes, TEXT | {"tokens": 600}))
    rates = Rates(
        seconds_per_work=dict.fromkeys({group.scheme for group in plan.groups()}, 0.0), seconds_per_hashed_byte=0.0
    )
    forecast = make_forecast(checkpoint, plan, rates, 1000, measure_text(plan))
    assert forecast.calibration is not None
    assert (forecast.calibration.rows, forecast.calibration.tokens) == (4, 512)
    shown = show_forecast(forecast)
    assert "calibration: 512 tokens of stdlib in 4 rows of 128\n" in shown
    row = next(line for line in shown.splitlines() if line.startswith("layers.0-1.qkv "))
    assert row.split()[2 : 2 + len(passes)] == list(passes)
    assert forecast.time.compute_seconds > 0
    assert forecast.memory.library_bytes == TEXT_LIBRARY_BYTES
    longer = make_plan(checkpoint, recipe_of_scheme(scheme, passes, {"seq_len": 257}))
    with pytest.raises(ValueError, match=r"seq_len is 257; .* reads 256 tokens at once: set seq_len to at most 256"):
        make_forecast(checkpoint, longer, rates, 1000, measure_text(longer))


@pytest.mark.parametrize(("bits", "warned"), [(2, True), (3, False)])
def test_gptq_makes_up_for_a_bit(tiny_llama: Path, bits: int, warned: bool) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plan = make_plan(checkpoint, recipe_of_scheme(f"w{bits}a16g32", ("gptq",), TEXT))
    schemes = {group.scheme for group in plan.groups()}
    rates = Rates(seconds_per_work=dict.fromkeys(schemes, 0.0), seconds_per_hashed_byte=0.0)
    forecast = make_forecast(checkpoint, plan, rates, 1000, measure_text(plan))
    assert [("w2a16g32: 2 bits can ruin a model" in line) for line in forecast.warnings] == [True] * warned


PROGRAM = """
import sys
import psutil, torch
from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import peak_rss_bytes
from pressd.compress.plan import make_plan
from pressd.compress.recipe import parse_recipe
from pressd.compress.text_memory import TextMemory
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import decoder_config

small, source, passes, out = sys.argv[1:]
torch.set_num_threads(2)

def rows(number, length):
    ids = torch.randint(0, 97, (number, length), generator=torch.Generator().manual_seed(0))
    return CalibrationRows(name="random", text_sha256="0" * 64, seed=0, ids=ids)

recipe = parse_recipe(passes + '[scheme]\\n"*" = "w4a16g32"\\n', "recipe")
compress(small, recipe, out + "-small", rows=rows(2, 32))  # code is loaded, and kernels are made
checkpoint = Checkpoint.open(source)
plan = make_plan(checkpoint, recipe)
memory = TextMemory(
    plan=plan, config=decoder_config(checkpoint), source=checkpoint.torch_dtype, rows=16, seq_len=512
)
before = psutil.Process().memory_info().rss
compress(source, recipe, out, rows=rows(16, 512))
print(peak_rss_bytes() - before, memory.peak_bytes(), checkpoint.artifact_bytes)
"""


@pytest.fixture(scope="module")
def middle_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose grams of 9 MiB and batches of 48 MiB are more than a process is uncertain about."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype="bfloat16",
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("models") / "middle_llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "passes",
    [
        '[[pass]]\nuse = "gptq"\nsweeps = 0\nclip = false\n',
        '[[pass]]\nuse = "rtn"\n[[pass]]\nuse = "round"\nsteps = 3\nrows = 8\n',
        pytest.param('[[pass]]\nuse = "awq"\n[[pass]]\nuse = "gptq"\n', marks=pytest.mark.slow),
    ],
)
def test_a_process_grows_by_what_was_estimated(
    tiny_llama: Path, middle_llama: Path, passes: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, tiny_llama, middle_llama, passes, tmp_path / "out"]
    # Every tensor of 64 KiB is given back as soon as it is freed: what remains is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    grown, working, mapped = map(int, printed.split())
    # As in test_memory.py, but code is loaded already: what is left are pieces below 64 KiB and tables of the kernels.
    assert 0.8 * working < grown < working + mapped + (32 << 20)
    assert working > 150 << 20


def test_what_is_too_large_for_the_heap_is_not_kept(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny_llama, recipe_of_scheme("w4a16g32", ("gptq",)))
    config = decoder_config(Checkpoint.open(tiny_llama))
    memory = TextMemory(plan=plan, config=config, source=plan.dtype, rows=4, seq_len=128)
    assert memory.kept_bytes() == memory.peak_bytes()
    monkeypatch.setattr(text_memory, "_LARGEST_ON_HEAP", 4 * 160**2 - 1)  # the gram of down is larger
    # Both streams, both sides of a layer, and what is stored of it stay in pieces.
    layer = plan.blocks[1]
    numbers = sum(rows * columns for rows, columns, _ in GROUPS)
    stored = sum(group.stored_bytes(plan.dtype) for group in layer.groups)
    assert memory.kept_bytes() == 4 * (2 * 512 * 64 + 2 * numbers) + stored
