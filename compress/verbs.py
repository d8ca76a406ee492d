"""The workshop's verbs on the command line: what each is called and which arguments it takes. No torch."""

import argparse

from pressd.compress import verb_runs as runs
from pressd.compress.protocol import SEQ_LEN, TOKENS

# The precisions that `convert` writes (compress/convert.py, which a parser must not import: it needs torch).
DTYPES = ("bfloat16", "float16", "float32")


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add one parser per verb; each sets `run`."""
    _add_compress(subparsers.add_parser("compress", help="press a checkpoint into an artifact"))
    _add_plan(subparsers.add_parser("plan", help="show what pressing would give and take, without reading weights"))
    _add_eval(subparsers.add_parser("eval", help="measure an artifact against its source"))
    _add_inspect(subparsers.add_parser("inspect", help="show what an artifact holds, without reading weights"))
    _add_verify(subparsers.add_parser("verify", help="check an artifact's files"))
    _add_compare(subparsers.add_parser("compare", help="show artifacts side by side: size against fidelity"))
    _add_convert(subparsers.add_parser("convert", help="decode an artifact into a directory that other tools load"))


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.description = "Press the dense checkpoint SOURCE into OUT. OUT appears complete or not at all."
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="directory to make")
    _add_source_and_recipe(parser)
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICES",
        help="where text is run through the model: auto (all GPUs, else the CPU), cpu, cuda, or cuda:0,cuda:1",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run for OUT that was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is at OUT")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    _add_factors(parser)
    # The whole line, which the program that was called knows.
    parser.set_defaults(run=runs.run_compress, command=None)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what pressing SOURCE would give (the size of every group and file, to the byte) and take (memory, from "
        "shapes; time, from a sample that is pressed on this machine now). Only headers are read."
    )
    _add_source_and_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, every group in it")
    parser.set_defaults(run=runs.run_plan)


def _add_source_and_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="Hugging Face directory (may be in the recipe)")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("-s", "--scheme", help="one scheme for every linear, such as w4a16g128, w8a8, bf16")
    how.add_argument("--recipe", metavar="FILE", help="TOML file: schemes per group, passes, calibration, gates")
    parser.add_argument(
        "--pass",
        dest="passes",
        metavar="NAME[,NAME]",
        type=_names,
        help="with -s: what presses, such as rtn (reads no text) or awq,gptq; default: gptq for integers and 8-bit "
        "floats, static as well where activations are, else none",
    )
    text = parser.add_argument_group("calibration text", "for passes that read some; each replaces a recipe's own")
    text.add_argument(
        "--calibration", metavar="DATA", help="stdlib (default), FILE.txt, FILE.jsonl or hf:OWNER/NAME/FILE.jsonl"
    )
    text.add_argument("--tokens", metavar="N", type=int, help="how many to read (default: 65536)")
    text.add_argument("--seq-len", metavar="N", type=int, help="tokens per row (default: 512)")
    text.add_argument("--seed", metavar="N", type=int, help="chooses the rows (default: 0)")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure DIR against its source: perplexity, KL, agreement, with standard errors over rows of text. Exit code "
        f"{runs.GATE_MISSED} if a gate of the recipe is missed. A measurement of at least the default size is kept in "
        "DIR."
    )
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--against", metavar="SOURCE", help="default: the checkpoint that DIR was pressed from")
    parser.add_argument("--data", default="stdlib", help="stdlib (held-out part), a .txt or .jsonl file, or hf:...")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens per row; default: %(default)s")
    parser.add_argument(
        "--robustness", action="store_true", help="also on text with typos, flipped case and other white space"
    )
    parser.add_argument(
        "--divergence", action="store_true", help="also where greedy continuations of prompts begin to differ"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME[,NAME]",
        type=_names,
        default=(),
        help="also tasks of lm-eval, by name or as .yaml files (needs pip install 'pressd[tasks]')",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_factors(parser)
    parser.set_defaults(run=runs.run_eval)


def _add_factors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grid-gco2-per-kwh", metavar="G", type=float, help="your grid's grams of CO2: tell what this run emitted"
    )
    parser.add_argument("--price-per-hour", metavar="P", type=float, help="of this machine: tell what this run cost")


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.set_defaults(run=runs.run_inspect)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check headers and sizes of DIR; small artifacts are hashed as well."
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--full", action="store_true", help="hash every file, whatever its size")
    parser.set_defaults(run=runs.run_verify)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show one row per artifact, and which of them no other beats in both size and KL. Only manifests are read: "
        "measure with `pressd eval` before."
    )
    parser.add_argument("artifacts", metavar="DIR", nargs="+")
    parser.add_argument("--png", metavar="FILE", help="draw size against KL (needs pip install 'pressd[plots]')")
    parser.add_argument("--html", metavar="FILE", help="write the table and the drawing as one page")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=runs.run_compare)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Decode DIR, an artifact or another compressed checkpoint, into the plain Hugging Face directory OUT, which "
        "appears complete or not at all."
    )
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--to", required=True, choices=("dense",), help="dense: ordinary weights")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="directory to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision to write (default: DIR's own); float32 rounds no weight once more"
    )
    parser.set_defaults(run=runs.run_convert)
