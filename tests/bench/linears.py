"""Time every linear kernel this machine can run, by rows: where do the branches cross?

    python tests/bench/linears.py [--out 2048 --in 2048] [--json]

Medians of interleaved runs, milliseconds. The constants FEW_ROWS in runtime/kernels are read off this table.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from pressd.runtime.kernels.catalogue import LINEAR
from pressd.runtime.kernels.dense import cpu as dense_cpu
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import cpu as int8_cpu
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import cpu as packed_int_cpu
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import LinearProblem, Tensors, describe_device

ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
BRANCHES = (dense_cpu, int8_cpu, packed_int_cpu)


def stored(problem: LinearProblem) -> Tensors:
    shape = (problem.out_features, problem.in_features)
    if problem.storage == dense.NAME:
        return dense.encode(torch.randn(shape).to(problem.dtype))
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8)
    groups = 1 if problem.group_size is None else problem.in_features // problem.group_size
    scale = torch.rand(problem.out_features, groups).to(torch.bfloat16)
    return int8.encode(codes, scale) if problem.storage == int8.NAME else packed_int.encode(codes, scale, problem.bits)


def candidates(out_features: int, in_features: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Every kernel in bfloat16; those with a branch on rows twice, each branch forced."""
    device = describe_device(torch.device("cpu"))
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for storage, bits, group_size, activation_bits in (
        ("dense", 16, None, 16),
        ("int8", 8, None, 8),
        ("packed_int", 4, 128, 16),
    ):
        problem = LinearProblem(
            storage=storage,
            bits=bits,
            group_size=group_size,
            activation_bits=activation_bits,
            out_features=out_features,
            in_features=in_features,
            dtype=torch.bfloat16,
        )
        tensors = stored(problem)
        for kernel in LINEAR:
            if kernel.storage != storage or kernel.why_not(problem, device) is not None:
                continue
            packed = kernel.pack(dict(tensors), problem, device)
            branching = next((module for module in BRANCHES if kernel.run.__module__ == module.__name__), None)
            for few_rows in (0, 1 << 20) if branching else (None,):

                def run(x, kernel=kernel, packed=packed, problem=problem, module=branching, few_rows=few_rows):  # type: ignore[no-untyped-def]
                    if module is not None:
                        module.FEW_ROWS = few_rows
                    return kernel.run(x, packed, problem)

                branch = {None: "", 0: " (many rows)", 1 << 20: " (few rows)"}[few_rows]
                found[f"{storage} {kernel.name}{branch}"] = run
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=2048, dest="out_features")
    parser.add_argument("--in", type=int, default=2048, dest="in_features")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kernels = candidates(arguments.out_features, arguments.in_features)
    table: dict[str, dict[int, float]] = {name: {} for name in kernels}
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, arguments.in_features).to(torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for turn in range(arguments.runs + 1):
                for name, run in kernels.items():
                    began = time.perf_counter()
                    run(x)
                    if turn:  # the first turn warms up
                        times[name].append((time.perf_counter() - began) * 1e3)
            for name in kernels:
                table[name][rows] = statistics.median(times[name])
    if arguments.json:
        print(json.dumps({"cpu": torch.backends.cpu.get_cpu_capability(), "milliseconds": table}))
        return
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, milliseconds")
    print(f"{'rows':34}" + "".join(f"{rows:>9}" for rows in ROWS))
    for name, row in table.items():
        print(f"{name:34}" + "".join(f"{row[rows]:9.2f}" for rows in ROWS))


if __name__ == "__main__":
    main()
