"""What schemes and passes cost: size, perplexity, KL and agreement on held-out text, seconds and memory of pressing.

    python tests/bench/quantise.py                        # all of it (hours), into docs; goes on where it was cut off
    python tests/bench/quantise.py --quick                # two cells of few tokens, on stdout
    python tests/bench/quantise.py --only "w2a16g32: "    # cells whose title has these words, if they are missing
    python tests/bench/quantise.py --from-json FILE       # write the documents again, measure nothing

Each cell (scheme, passes, seed of the calibration rows) is measured in a process of its own and kept at once. A cell is
not measured again unless it is with `--fresh`, which takes `--only` into account: the document says of which commits
its numbers are. What passes do depends on code, so measure those again that a change is about.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from engine import processor
from quantise_cells import INTEGERS, PEERS, Cell, all_cells, cells_beside_peers, quick_cells
from quantise_plot import plot
from quantise_report import into_guide, markdown

from pressd.compress.protocol import TOKENS
from pressd.compress.recipe import Calibration

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "pylm"
FOLDER = ROOT / "docs" / "benchmarks"
GUIDE = ROOT / "docs" / "schemes.md"
KEPT = ROOT / "build" / "bench" / "quantise.json"
PEER_RESULTS = ROOT / "tests" / "compress" / "peers.json"
FULL = {"calibration": Calibration().tokens, "evaluation": TOKENS}
FEW = {"calibration": 2048, "evaluation": 2048}
Row: TypeAlias = dict[str, Any]


class Kept:
    """Rows in a JSON file, written whole after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []

    def find(self, key: Row) -> Row | None:
        """Return the row of a cell that was measured with so many tokens."""
        return next((row for row in self._rows if key.items() <= row.items()), None)

    def put(self, key: Row, row: Row) -> None:
        """Keep a row in place of the one that was there."""
        self._rows = [other for other in self._rows if not key.items() <= other.items()] + [key | row]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self._rows, indent=1) + "\n")
        temporary.replace(self._path)


def key_of(cell: Cell, tokens: dict[str, int]) -> Row:
    """What tells a row from others: the cell, and how much text; the peers' rows are as many as they are."""
    return {"cell": asdict(cell), "tokens": None if cell.rows == PEERS else tokens}


def code() -> str:
    """A digest of what is measured and of what measures."""
    digest = hashlib.sha256()
    folders = [ROOT / "compress", ROOT / "runtime"]
    for path in sorted([path for folder in folders for path in folder.rglob("*.py")]):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).with_name("quantise_row.py").read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, str]:
    """What a row depends on besides its cell."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "commit": described.stdout.strip(),
        "code": code(),
    }


def measure(cell: Cell, tokens: dict[str, int] | None, peers: Path, threads: int | None) -> Row:
    """Measure one cell in a process of its own; raises CalledProcessError if it fails, which has said why."""
    told = {"cell": asdict(cell), "tokens": tokens, "source": str(SOURCE), "peers": str(peers), "threads": threads}
    command = [sys.executable, str(Path(__file__).with_name("quantise_row.py")), json.dumps(told)]
    found: Row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def measure_all(
    cells: Sequence[Cell], tokens: dict[str, int], kept: Kept, measured: Callable[[Cell], Row], *, fresh: bool
) -> list[str]:
    """Measure the cells that `kept` lacks (all if `fresh`), and return the titles of those that failed."""
    failed = []
    for cell in cells:
        key = key_of(cell, tokens)
        if kept.find(key) is not None and not fresh:
            continue
        began = time.monotonic()
        try:
            row = measured(cell)
        except subprocess.CalledProcessError:
            failed.append(cell.title)
            print(f"{cell.title}: failed", file=sys.stderr, flush=True)
            continue
        kept.put(key, {"date": time.strftime("%Y-%m-%d")} | row)
        spent = time.monotonic() - began
        print(f"{cell.title}: KL {row['kl_mean']:.5f}, measured in {spent:.0f} s", file=sys.stderr, flush=True)
    return failed


def peer_results(path: Path) -> list[Row]:
    """Return what other tools reached, nothing if the file is not there."""
    results: list[Row] = json.loads(path.read_text())["results"] if path.is_file() else []
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="measure cells whose title has one of these in it")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--list", action="store_true", help="print the cells' titles, measure nothing")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--peers", type=Path, default=PEER_RESULTS, metavar="FILE", help="results of other tools")
    parser.add_argument("--rows", type=Path, default=KEPT, metavar="FILE", help="where rows are kept: %(default)s")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="write the documents from kept rows alone")
    parser.add_argument("--no-write", action="store_true", help="print the document, write none")
    told = parser.parse_args(argv)
    tokens = FEW if told.quick else FULL
    peers = [] if told.quick else peer_results(told.peers)
    theirs = {result["scheme"] for result in peers}
    cells = quick_cells() if told.quick else all_cells()
    beside = cells_beside_peers([scheme for scheme in INTEGERS if scheme in theirs])
    chosen = [
        cell for cell in (*cells, *beside) if told.only is None or any(words in cell.title for words in told.only)
    ]
    if told.list or not chosen:
        print("\n".join(cell.title for cell in chosen) or f"no cell has any of {told.only} in its title")
        return 0 if chosen else 1
    kept, failed = Kept(told.from_json or told.rows), []
    if told.from_json is None:
        setting = environment()

        def measured(cell: Cell) -> Row:
            own = key_of(cell, tokens)["tokens"]
            return {"environment": setting} | measure(cell, own, told.peers, told.threads)

        failed = measure_all(chosen, tokens, kept, measured, fresh=told.fresh)
    rows, rows_beside = ([row for cell in part if (row := kept.find(key_of(cell, tokens)))] for part in (cells, beside))
    if rows:
        missing = [cell.title for cell in (*cells, *beside) if kept.find(key_of(cell, tokens)) is None]
        document = markdown(rows, rows_beside, peers, missing)
        print(document)
        if not (told.quick or told.no_write):
            (FOLDER / "quantise.md").write_text(document)
            plot(rows, FOLDER / "quantise.svg")
            GUIDE.write_text(into_guide(GUIDE.read_text(), rows))
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
