"""The engine driven directly, against transformers' generate: tokens per second, time outside of layers, memory.

    python tests/bench/engine.py            # every row, into docs/benchmarks/engine.md; goes on where it was cut off
    python tests/bench/engine.py --quick    # the example model, fewer runs, on stdout

Each row (a model in a scheme) is measured in a process of its own, in which the engine and transformers take turns with
the same prompts. Rows that were measured with the same settings, code and machine are not measured again.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_report import markdown

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks" / "engine.md"
KEPT = ROOT / "build" / "bench" / "engine.json"
SCHEMES = ("bf16", "w8a8", "w4a16g128")
PYLM, BILLION = "pylm", "random-1b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one model is measured."""

    new_tokens: int
    runs: int
    batches: tuple[int, ...] = (1, 4, 8, 16)
    prompt: int = 32
    prefill: int = 512


FULL = {PYLM: Plan(new_tokens=128, runs=5), BILLION: Plan(new_tokens=32, runs=3)}
QUICK = {PYLM: Plan(new_tokens=32, runs=3, batches=(1, 4, 16))}


def code() -> str:
    """A digest of what is measured and of what measures."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "runtime").rglob("*.py"), *Path(__file__).parent.glob("engine*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.machine()


def environment(threads: int | None) -> dict[str, Any]:
    """What a row depends on besides its plan."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "commit": commit.strip(),
        "code": code(),
    } | versions


def measure(model: str, scheme: str, plan: Plan, threads: int | None) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    told = json.dumps({"model": model, "scheme": scheme, "threads": threads, "plan": asdict(plan)})
    command = [sys.executable, str(Path(__file__).with_name("engine_row.py")), told]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, Any] = json.loads(answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=(PYLM, BILLION))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--rows", type=Path, default=KEPT, metavar="FILE", help="JSON of every number; %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"default: {DOCUMENT.relative_to(ROOT)}, unless --quick"
    )
    arguments = parser.parse_args()
    plans = QUICK if arguments.quick else FULL
    out = arguments.out or (None if arguments.quick else DOCUMENT)
    setting = environment(arguments.threads)
    kept = json.loads(arguments.rows.read_text()) if arguments.rows.is_file() else []
    rows = []
    for model in arguments.models or plans:
        for scheme in arguments.schemes:
            key = {"model": model, "scheme": scheme, "environment": setting, "plan": asdict(plans[model])}
            key = json.loads(json.dumps(key))
            row = next((row for row in kept if key.items() <= row.items()), None)
            if row is None or arguments.fresh:
                began = time.monotonic()
                row = (
                    key | {"date": time.strftime("%Y-%m-%d")} | measure(model, scheme, plans[model], arguments.threads)
                )
                print(f"{model} {scheme}: measured in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                kept = [other for other in kept if not key.items() <= other.items()] + [row]
                arguments.rows.parent.mkdir(parents=True, exist_ok=True)
                arguments.rows.write_text(json.dumps(kept, indent=1) + "\n")
            rows.append(row)
    document = markdown(rows)
    print(document)
    if out is not None:
        out.write_text(document)


if __name__ == "__main__":
    main()
