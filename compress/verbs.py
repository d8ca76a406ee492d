"""The workshop's verbs on the command line: compress, eval, inspect, verify.

Each callable takes parsed arguments, prints to stdout what was asked for and to stderr how far it is, and returns the
exit code; a ValueError is the user's to read. What needs torch is imported by the verb that runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.compress.protocol import SEQ_LEN, TOKENS

if TYPE_CHECKING:
    from pressd.compress.press import BlockDone

GATE_MISSED = 3
_SECONDS_BETWEEN_LINES = 5.0


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add one parser per verb; each sets `run`."""
    _add_compress(subparsers.add_parser("compress", help="press a checkpoint into an artifact"))
    _add_eval(subparsers.add_parser("eval", help="measure an artifact against its source"))
    _add_inspect(subparsers.add_parser("inspect", help="show what an artifact holds, without reading weights"))
    _add_verify(subparsers.add_parser("verify", help="check an artifact's files"))


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.description = "Press the dense checkpoint SOURCE into OUT. OUT appears complete or not at all."
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="Hugging Face directory (may be in the recipe)")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="directory to make")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("-s", "--scheme", help="one scheme for every linear, such as w4a16g128, w8a8, bf16")
    how.add_argument("--recipe", metavar="FILE", help="TOML file: schemes per group, gates")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is at OUT")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.set_defaults(run=run_compress)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure DIR against its source: perplexity, KL, agreement, with standard errors over rows of text. Exit code "
        f"{GATE_MISSED} if a gate of the recipe is missed. A measurement of at least the default size is kept in DIR."
    )
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--against", metavar="SOURCE", help="default: the checkpoint that DIR was pressed from")
    parser.add_argument("--data", default="stdlib", help="stdlib (held-out part), or a .txt or .jsonl file")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens per row; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_eval)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.set_defaults(run=run_inspect)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check headers and sizes of DIR; small artifacts are hashed as well."
    parser.add_argument("artifact", metavar="DIR")
    parser.add_argument("--full", action="store_true", help="hash every file, whatever its size")
    parser.set_defaults(run=run_verify)


def run_compress(args: argparse.Namespace) -> int:
    """Press, then say what came out."""
    from pressd.compress.inspect import show_totals
    from pressd.compress.press import compress
    from pressd.compress.recipe import read_recipe

    recipe = args.scheme if args.recipe is None else read_recipe(Path(args.recipe))
    source = args.source or (None if args.recipe is None else recipe.source)
    if source is None:
        raise ValueError("there is no source; give SOURCE, or `source` in the recipe")
    progress = _Progress()

    def tell(block: "BlockDone") -> None:
        progress.tell(block.block, block.done, block.total)

    manifest = compress(source, recipe, args.out, overwrite=args.overwrite, progress=tell)
    _say(manifest.to_json() if args.json else f"{args.out}: {show_totals(manifest)}\n")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Measure, record, and check the recipe's gates."""
    from pressd.compress.evaluate import evaluate, missed_gates, record_quality
    from pressd.compress.inspect import show_quality
    from pressd.runtime.artifact.manifest import read_manifest

    quality = evaluate(
        args.artifact,
        args.against,
        data=args.data,
        tokens=args.tokens,
        seq_len=args.seq_len,
        progress=_Progress().tell,
    )
    recorded = record_quality(args.artifact, quality)
    _say((json.dumps(quality) if args.json else show_quality(quality)) + "\n")
    if not args.json:
        _say("recorded in the manifest\n" if recorded else "not recorded: too few tokens, or not an artifact\n")
    missed = missed_gates(read_manifest(Path(args.artifact)), quality)
    for line in missed:
        sys.stderr.write(f"{line}\n")
    return GATE_MISSED if missed else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print the manifest as a table or as JSON."""
    from pressd.compress.inspect import read, show

    manifest = read(args.artifact)
    _say(manifest.to_json() if args.json else f"{show(manifest)}\n")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check the files; the reader's own checks are part of opening."""
    from pressd.runtime.artifact.reader import Checkpoint

    checkpoint = Checkpoint.open(args.artifact)
    checkpoint.verify(full=args.full)
    what = "headers agree with config.json" if checkpoint.manifest is None else "files agree with the manifest"
    _say(f"{args.artifact}: {what}; id {checkpoint.artifact_id}\n")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text)


class _Progress:
    """A line on stderr that rewrites itself on a terminal; elsewhere a new line every few seconds and at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def tell(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{done}/{total} {what}" + ("\n" if done == total else ""))
        elif done == total or now - self._last >= _SECONDS_BETWEEN_LINES:
            sys.stderr.write(f"{done}/{total} {what}\n")
            self._last = now
        sys.stderr.flush()
