"""Up to how many rows of x a kernel's branch for few rows is the faster one, as measured.

Each number belongs to the instruction set it was measured with; tests/bench/crossover.py prints the table it is read
off, and docs/benchmarks/cpu-crossover.md keeps the one of this machine.
"""

import torch

from pressd.runtime.kernels.registry import describe_device

# By branch: over 2048 x 2048, 8192 x 2048 and 2048 x 8192 on 2 cores of AMD Zen 4 (AVX-512, VNNI, bfloat16; November
# 2026), and over 2048 x 2048 on 2 of Zen 3 (AVX2; before), where what is not listed was not measured.
FEW_ROWS: dict[str, dict[str, int]] = {
    "dense bf16": {"avx2": 8},
    "dense fp16": {"avx512": 13},
    "int8 codes a8": {"avx512": 10, "avx2": 32},
    "int8 codes a16": {"avx512": 13},
    "1 x int4 before floats": {"avx512": 64, "avx2": 64},
    "2 x int4 before floats": {"avx512": 24},
    "1 x int4 before int8": {"avx512": 26},
    "2 x int4 before int8": {"avx512": 8},
}


def few_rows(branch: str) -> int:
    """Return the measured crossover of this machine's instruction set, or of the nearest that was measured."""
    measured = FEW_ROWS[branch]
    mine = "avx512" if "avx512" in describe_device(torch.device("cpu")).features else "avx2"
    return measured.get(mine, next(iter(measured.values())))
