"""Where branches cross: what the kernels look up, and what the benchmark that finds it makes of its timings."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pressd.runtime.kernels import crossovers
from pressd.runtime.kernels.packed_int import nibbles
from pressd.runtime.kernels.registry import Device


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "crossover.py"
    spec = importlib.util.spec_from_file_location("crossover_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("features", "rows"), [({"avx512", "vnni", "bf16"}, (13, 10)), ({"avx2"}, (13, 32)), ({"default"}, (13, 32))]
)
def test_each_instruction_set_has_its_own_numbers(
    features: set[str], rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was never measured with AVX2 takes the number that there is."""
    device = Device(torch_device=torch.device("cpu"), features=frozenset(features))
    monkeypatch.setattr(crossovers, "describe_device", lambda _: device)
    numbers = {"both": {"avx512": 10, "avx2": 32}, "one": {"avx512": 13}}
    monkeypatch.setattr(crossovers, "FEW_ROWS", numbers)
    assert (crossovers.few_rows("one"), crossovers.few_rows("both")) == rows


def test_the_suggestion_is_where_both_cost_the_same(bench: ModuleType) -> None:
    """One millisecond a row against ten for any number: 10, of which only its neighbours were measured."""
    rows = (1, 2, 4, 8, 16, 32, 64)
    few, many = {count: 1.0 * count for count in rows}, dict.fromkeys(rows, 10.0)
    assert bench.suggest([few], [many]) == 10
    # A second shape that crosses at 40 moves it to the geometric mean.
    assert bench.suggest([few, few], [many, dict.fromkeys(rows, 40.0)]) == 20
    assert bench.suggest([many], [dict.fromkeys(rows, 20.0)]) == 64
    assert bench.suggest([dict.fromkeys(rows, 20.0)], [many]) == 0
    # One bad timing among the first does not end the search.
    assert bench.suggest([few | {2: 11.0}], [many]) == 10


@pytest.mark.skipif(nibbles.block_rows() is None, reason="PyTorch packs int4 in another way here")
def test_each_branch_is_timed_and_the_kernel_left_as_it_was(bench: ModuleType) -> None:
    before = {branch: dict(rows) for branch, rows in crossovers.FEW_ROWS.items()}
    torch.manual_seed(0)
    bench.COLD_BYTES = 1
    table = bench.sweep("w4a16g32", (32, 64), [1, 3], turns=1)
    assert list(table)[:3] == ["cpu-nibbles", "cpu-nibbles few", "cpu-nibbles many"]
    assert all(
        set(cells) == {1, 3} and all(time > 0 for cell in cells.values() for time in cell) for cells in table.values()
    )
    assert before == crossovers.FEW_ROWS


def test_a_forced_branch_ends_with_the_call_even_if_it_fails(bench: ModuleType) -> None:
    before = {branch: dict(rows) for branch, rows in crossovers.FEW_ROWS.items()}
    seen = []

    def fail(x: torch.Tensor, packed: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(count for rows in crossovers.FEW_ROWS.values() for count in rows.values())
        raise ZeroDivisionError

    contender = bench.Contender(
        name="fails", run=fail, copies=itertools.repeat({}), few_rows=bench.ALWAYS, dtype=torch.float32
    )
    with pytest.raises(ZeroDivisionError):
        contender.time(torch.zeros(1, 1))
    assert set(seen) == {bench.ALWAYS}
    assert before == crossovers.FEW_ROWS
