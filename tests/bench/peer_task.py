"""What a quantiser compared with ours is asked to do, and what it answers: for the scripts that run in its Python.

Needs torch and safetensors alone.
"""

import argparse
import json
import os
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SCHEME = re.compile(r"w(\d)a16g(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One press: `ids` int64 [rows, tokens] to calibrate on, symmetric integers of `bits` in groups of `group_size`."""

    model: Path
    ids: torch.Tensor
    bits: int
    group_size: int
    out: Path
    method: str


def read_task(description: str, methods: tuple[str, ...]) -> Task:
    """Read the task from the command line; the first of `methods` is the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--tokens", type=Path, required=True, help=".safetensors file with `ids` [rows, tokens]")
    parser.add_argument("--scheme", required=True, help="such as w4a16g128")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--method", choices=methods, default=methods[0])
    arguments = parser.parse_args()
    parsed = SCHEME.fullmatch(arguments.scheme)
    if parsed is None:
        parser.error(f"--scheme {arguments.scheme}: give one such as w4a16g128")
    return Task(
        model=arguments.model,
        ids=load_file(arguments.tokens)["ids"],
        bits=int(parsed[1]),
        group_size=int(parsed[2]),
        out=arguments.out,
        method=arguments.method,
    )


class Stopwatch:
    """Seconds since it was made: of the clock, and of all processors together, which other work does not lengthen."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return `seconds` and `cpu_seconds`."""
        return {"seconds": time.perf_counter() - self._began[0], "cpu_seconds": time.process_time() - self._began[1]}


def answer(packages: tuple[str, ...], **facts: Any) -> None:
    """Print, as the last line, what the caller writes down: versions, threads and `facts`."""
    facts["versions"] = {name: version(name) for name in (*packages, "torch", "transformers")}
    facts["threads"] = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    print(json.dumps(facts))
