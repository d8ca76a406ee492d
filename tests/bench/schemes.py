"""What each scheme costs: size, perplexity, KL and agreement on held-out text.

    python tests/bench/schemes.py                            # the table of README.md, into README.md
    python tests/bench/schemes.py --source MODEL --no-write  # the same for another checkpoint, on stdout

Each line is a recipe's [scheme] table; every artifact is pressed anew, measured by `pressd eval`'s code, and removed.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pressd.compress import compress
from pressd.compress.evaluate import evaluate
from pressd.compress.protocol import SEQ_LEN, TOKENS
from pressd.compress.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "pylm"
README = ROOT / "README.md"
# Label and rules; a label alone is the scheme of every linear of the decoder's layers.
RECIPES: tuple[tuple[str, str], ...] = (
    ("bf16", ""),
    ("fp16", ""),
    ("w8a8", ""),
    ("w8a16", ""),
    ("w4a16g32", ""),
    ("w4a16g64", ""),
    ("w4a16g128", ""),
    ("w4a8g128", ""),
    ("w4a16g128, embed w8a16", '"*" = "w4a16g128"\n"embed" = "w8a16"'),
    ("w4a16g128, lm_head w8a16 (untied)", '"*" = "w4a16g128"\n"lm_head" = "w8a16"'),
    ("w3a16g32", ""),
    ("w3a16g32+residual16", ""),
    ("w2a16g32", ""),
    ("sparse24:w8a16", ""),
    ("lowrank64:bf16", ""),
)
HEADS = ("scheme", "bytes", "ratio", "bpw", "perplexity", "KL", "top-1")
MARKS = re.compile(r"(<!-- numbers: begin \(.*?\) -->\n).*?(<!-- numbers: end -->)", re.DOTALL)


def measure(source: Path, label: str, rules: str, tokens: int) -> dict[str, Any]:
    """Press and measure one recipe; bytes are of the weight files."""
    everywhere = f'"*" = "{label}"'
    recipe = parse_recipe(f"[scheme]\n{rules or everywhere}\n", label)
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        manifest = compress(source, recipe, Path(directory) / "out")
        seconds = time.perf_counter() - began
        quality = evaluate(Path(directory) / "out", source, tokens=tokens)
    totals = manifest.totals
    return {
        "scheme": label,
        "bytes": totals.bytes,
        "ratio": totals.ratio,
        "bpw": totals.bpw,
        "press_seconds": seconds,
        **{name: quality[name] for name in ("ppl", "kl_mean", "top1_agreement", "stderr", "data")},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table with what it was measured on."""
    lines = [HEADS, ("---", *["---:"] * (len(HEADS) - 1))]
    for row in rows:
        bpw = 16.0 if row["bpw"] is None else row["bpw"]
        kl, top1 = f"{row['kl_mean']:.5f}", f"{row['top1_agreement']:.2%}"
        lines.append(
            (row["scheme"], f"{row['bytes']:,}", f"{row['ratio']:.2f}", f"{bpw:.2f}", f"{row['ppl']:.3f}", kl, top1)
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    data = rows[0]["data"]
    what = f"{data['tokens']:,} held-out tokens of the standard library of Python {platform.python_version()}"
    return f"{table}\n\nMeasured on {what}, in rows of {data['seq_len']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"in rows of {SEQ_LEN}; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there as well")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave README.md alone")
    arguments = parser.parse_args()
    rows = []
    for label, rules in RECIPES:
        rows.append(measure(arguments.source, label, rules, arguments.tokens))
        print(f"{label}: KL {rows[-1]['kl_mean']:.5f}", file=sys.stderr, flush=True)
    table = markdown(rows)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if not arguments.no_write:
        README.write_text(MARKS.sub(lambda marks: f"{marks[1]}{table}{marks[2]}", README.read_text()))


if __name__ == "__main__":
    main()
