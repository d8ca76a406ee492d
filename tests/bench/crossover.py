"""Time the CPU kernels of each scheme by rows: where do a kernel's branches cross, and what does bfloat16 take?

    python tests/bench/crossover.py [--schemes w8a8 w4a16g128] [--shapes 2048x2048 8192x2048] [--rows 1 8 64] [--json]

Each kernel runs as it is and with each of its branches forced, in turn with the library's dense bfloat16 product. A
table holds medians, in milliseconds, and under "of bf16" the median of each run divided by the dense run just before
it, which a busy machine disturbs less. Weights are read from memory: copies of them, more than a cache holds, take
turns. Everything that a call does is counted, quantising activations and widening weights too. The suggestions printed
last are what runtime/kernels/crossovers.py records.
"""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels import crossovers
from pressd.runtime.kernels.catalogue import LINEAR
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import REFERENCE, LinearProblem, Tensors, describe_device

SCHEMES = "fp16 w8a8 w8a16 w8a16g128 w6a16g128 w6a8 w4a16 w4a16g32 w4a16g128 w4a8 w4a8g128 w3a16g128 w2a16g128"
SHAPES = "2048x2048 8192x2048 2048x8192"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COLD_BYTES = 64 << 20
ALWAYS, NEVER = 1 << 30, -1
Table = dict[str, dict[int, tuple[float, float]]]  # by kernel and rows: milliseconds, of bf16
DEVICE = describe_device(torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to multiply; `branches` is set around the call, None leaves the kernel as it is."""

    name: str
    run: Callable[[torch.Tensor, Tensors], torch.Tensor]
    copies: Iterator[Tensors]
    few_rows: int | None
    dtype: torch.dtype

    def time(self, x: torch.Tensor) -> float:
        """Return milliseconds of one call."""
        packed = next(self.copies)
        with forced(self.few_rows):
            began = time.perf_counter()
            self.run(x, packed)
            return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def forced(few_rows: int | None) -> Iterator[None]:
    """Make every kernel take its branch for few rows up to `few_rows`."""
    measured = {branch: dict(rows) for branch, rows in crossovers.FEW_ROWS.items()}
    try:
        if few_rows is not None:
            for rows in crossovers.FEW_ROWS.values():
                rows.update(dict.fromkeys(rows, few_rows))
        yield
    finally:
        crossovers.FEW_ROWS.update(measured)


def stored(spec: Packed, dtype: torch.dtype) -> Tensors:
    shape = (spec.out_features, spec.in_features)
    if spec.storage == dense.NAME:
        return dense.encode(torch.randn(shape).to(dtype))
    half = 1 << (spec.bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8)
    scale = torch.rand(spec.out_features, spec.in_features // (spec.group_size or spec.in_features)).to(torch.bfloat16)
    return int8.encode(codes, scale) if spec.storage == int8.NAME else packed_int.encode(codes, scale, spec.bits)


def contenders(scheme: str, shape: tuple[int, int]) -> list[Contender]:
    """Every fast kernel that takes the scheme, as it is and by branch; dense bfloat16 is the library's product."""
    spec = parse_scheme(scheme).spec(shape)
    assert isinstance(spec, Packed)
    dtype = torch.float16 if scheme == "fp16" else torch.bfloat16
    problem = LinearProblem(
        storage=spec.storage,
        bits=spec.bits,
        group_size=spec.group_size,
        activation_bits=spec.activation_bits,
        out_features=shape[0],
        in_features=shape[1],
        dtype=dtype,
    )
    num_copies = math.ceil(COLD_BYTES / spec.stored_bytes(torch.bfloat16))
    found = []
    kernels = [kernel for kernel in LINEAR if kernel.storage == spec.storage]
    for kernel in kernels:
        if kernel.why_not(problem, DEVICE) is not None or (kernel.name == REFERENCE and scheme != "bf16"):
            continue
        tensors = stored(spec, dtype)
        copies = [kernel.pack(dict(tensors), problem, DEVICE) for _ in range(num_copies)]
        if spec.storage == dense.NAME:
            copies = [{name: tensor.clone() for name, tensor in packed.items()} for packed in copies]
        branches = {"": None, " few": ALWAYS, " many": NEVER}
        if kernel.name in (REFERENCE, "cpu-onednn"):
            branches = {"": None}
        for suffix, few_rows in branches.items():

            def run(x, packed, kernel=kernel):  # type: ignore[no-untyped-def]
                return kernel.run(x, packed, problem)

            found.append(
                Contender(
                    name=f"{kernel.name}{suffix}",
                    run=run,
                    copies=itertools.cycle(copies),
                    few_rows=few_rows,
                    dtype=dtype,
                )
            )
    return found


def measure(
    candidates: list[Contender], base: Contender, num_rows: int, in_features: int, turns: int
) -> dict[str, tuple[float, float]]:
    """Return (median milliseconds, median ratio to the dense run before) of each."""
    x = torch.randn(num_rows, in_features)
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    ratios: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(turns + 1):
        for candidate in candidates:
            dense_time = base.time(x.to(base.dtype))
            own_time = candidate.time(x.to(candidate.dtype))
            if turn:  # the first turn warms up
                times[candidate.name].append(own_time)
                ratios[candidate.name].append(own_time / dense_time)
    return {name: (statistics.median(times[name]), statistics.median(ratios[name])) for name in times}


def suggest(few: list[dict[int, float]], many: list[dict[int, float]]) -> int:
    """Return up to how many rows to take the branch for few: the choice that loses the least time, over all shapes.

    The number lies between two measured ones where the branches cost the same on logarithmic axes.
    """
    rows = sorted(few[0])
    lead = [sum(math.log(m[count] / f[count]) for f, m in zip(few, many, strict=True)) for count in rows]
    best = max(range(len(rows) + 1), key=lambda cut: sum(lead[:cut]) - sum(lead[cut:]))
    if best in (0, len(rows)):
        return rows[best - 1] if best else 0
    before, after = lead[best - 1], lead[best]
    return round(rows[best - 1] * (rows[best] / rows[best - 1]) ** (before / (before - after)))


def sweep(scheme: str, shape: tuple[int, int], rows: list[int], turns: int) -> Table:
    base = contenders("bf16", shape)[-1]
    candidates = contenders(scheme, shape)
    table: Table = {candidate.name: {} for candidate in candidates}
    for num_rows in rows:
        for name, result in measure(candidates, base, num_rows, shape[1], turns).items():
            table[name][num_rows] = result
    return table


def crossings(tables: list[Table]) -> dict[str, int]:
    """Return the suggested crossover of each kernel with branches, from its tables of one scheme at several shapes."""
    found = {}
    for name in tables[0]:
        if f"{name} few" in tables[0]:
            few, many = (
                [{rows: cell[0] for rows, cell in table[f"{name} {branch}"].items()} for table in tables]
                for branch in ("few", "many")
            )
            found[name] = suggest(few, many)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES.split())
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split(), metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    machine = f"{', '.join(sorted(DEVICE.features))}; {torch.get_num_threads()} threads; torch {torch.__version__}"
    results: dict[str, dict[str, Table]] = {}
    if not arguments.json:
        print(machine)
    with torch.inference_mode():
        for scheme, text in itertools.product(arguments.schemes, arguments.shapes):
            out_features, in_features = map(int, text.split("x"))
            table = sweep(scheme, (out_features, in_features), arguments.rows, arguments.turns)
            results.setdefault(scheme, {})[text] = table
            if not arguments.json:
                show(f"{scheme} {text}", table, arguments.rows)
    suggested = {scheme: crossings(list(tables.values())) for scheme, tables in results.items()}
    if arguments.json:
        print(json.dumps({"machine": machine, "milliseconds_and_of_bf16": results, "crossovers": suggested}))
        return
    print()
    for scheme, found in suggested.items():
        for name, crossover in found.items():
            print(f"{scheme}: few rows up to {crossover} for {name}")


def show(title: str, table: Table, rows: list[int]) -> None:
    print(f"\n{title:>24}" + "".join(f"{num_rows:>8}" for num_rows in rows))
    for name, cells in table.items():
        print(f"{name:>24}" + "".join(f"{cells[num_rows][0]:8.2f}" for num_rows in rows))
        print(f"{'of bf16':>24}" + "".join(f"{cells[num_rows][1]:8.2f}" for num_rows in rows))


if __name__ == "__main__":
    main()
