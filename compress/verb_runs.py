"""What the workshop's verbs do.

Each callable takes parsed arguments, prints to stdout what was asked for and to stderr how far it is, and returns the
exit code; a ValueError is the user's to read. What needs torch is imported by the verb that runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.compress.progress import ProgressLine

if TYPE_CHECKING:
    from pressd.compress.press import BlockDone
    from pressd.compress.spending import Factors

GATE_MISSED = 3


def run_compress(args: argparse.Namespace) -> int:
    """Press, then say what came out."""
    from pressd.compress.chosen_recipe import source_and_recipe
    from pressd.compress.devices import chosen_devices
    from pressd.compress.inspect import show_totals
    from pressd.compress.press import compress
    from pressd.compress.report import read_report
    from pressd.compress.spending import show_spent, spent
    from pressd.compress.staging import unfinished

    factors = _factors(args)
    factors.check()
    source, recipe = source_and_recipe(args)
    devices = chosen_devices(args.device, reads_text=recipe.reads_text)
    progress = ProgressLine()

    def tell(block: "BlockDone") -> None:
        progress.tell(f"{block.block} (resumed)" if block.was_done else block.block, block.done, block.total)

    out = Path(args.out)
    _tell_leftovers(out, resume=args.resume)
    try:
        manifest = compress(
            source,
            recipe,
            out,
            overwrite=args.overwrite,
            resume=args.resume,
            devices=devices,
            progress=tell,
            command=args.command,
        )
    except KeyboardInterrupt:
        left = unfinished(out)
        if left is not None:
            sys.stderr.write(f"\n{left} keeps what is finished; the same command with --resume goes on with it\n")
        raise
    _say(manifest.to_json() if args.json else f"{args.out}: {show_totals(manifest.totals)}\n")
    if factors.are_told:
        report = read_report(out)
        assert report is not None
        sys.stderr.write(f"{show_spent(spent(report.cost.wall_seconds, report.cost.joules, factors))}\n")
    return 0


def _tell_leftovers(out: Path, *, resume: bool) -> None:
    """Say what killed runs have left beside `out`, and what can be done about it."""
    from pressd.compress.staging import leftovers, unfinished
    from pressd.runtime.artifact.manifest import is_artifact

    begun = unfinished(out)
    if resume:
        sys.stderr.write(f"going on with {begun}\n" if begun else "note: there is nothing to resume; pressing anew\n")
    for path in leftovers(out):
        what = "what was there before is in it" if is_artifact(path) else "it can be removed"
        if path == begun:
            if resume:
                continue
            what = "--resume goes on with it, or it can be removed"
        sys.stderr.write(f"note: {path} is left from a run that was killed; {what}\n")


def run_plan(args: argparse.Namespace) -> int:
    """Say what pressing would give and take."""
    import psutil

    from pressd.compress.chosen_recipe import source_and_recipe
    from pressd.compress.forecast import make_forecast
    from pressd.compress.forecast_text import forecast_json, show_forecast
    from pressd.compress.plan import make_plan
    from pressd.compress.rates import measure
    from pressd.compress.text_rates import measure_text
    from pressd.runtime.artifact.reader import Checkpoint

    source, recipe = source_and_recipe(args)
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe)
    process_bytes = psutil.Process().memory_info().rss
    text_rates = measure_text(plan) if plan.reads_text else None
    forecast = make_forecast(checkpoint, plan, measure(plan, checkpoint.torch_dtype), process_bytes, text_rates)
    _say((forecast_json(forecast) if args.json else show_forecast(forecast)) + "\n")
    for line in () if args.json else forecast.warnings:
        sys.stderr.write(f"warning: {line}\n")
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
        robustness=args.robustness,
        diverge=args.divergence,
        task_names=args.tasks,
        factors=_factors(args),
        progress=ProgressLine().tell,
    )
    _say((json.dumps(quality) if args.json else show_quality(quality)) + "\n")
    missed = missed_gates(read_manifest(Path(args.artifact)), quality)
    for line in missed:
        sys.stderr.write(f"{line}\n")
    recorded = record_quality(args.artifact, quality)
    if not args.json:
        _say("recorded in the manifest\n" if recorded else "not recorded: too few tokens, or not an artifact\n")
    return GATE_MISSED if missed else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print the manifest as a table or as JSON."""
    from pressd.compress.inspect import read, show
    from pressd.compress.report import read_report

    manifest = read(args.artifact)
    _say(manifest.to_json() if args.json else f"{show(manifest, read_report(Path(args.artifact)))}\n")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check the files; the reader's own checks are part of opening."""
    from pressd.runtime.artifact.reader import Checkpoint

    checkpoint = Checkpoint.open(args.artifact)
    checkpoint.verify(full=args.full)
    what = "headers agree with config.json" if checkpoint.manifest is None else "files agree with the manifest"
    _say(f"{args.artifact}: {what}; id {checkpoint.artifact_id}\n")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Print a row per artifact, and draw them if asked."""
    from pressd.compress.compare import compare, comparison_json, show_comparison
    from pressd.compress.compare_html import write_comparison
    from pressd.compress.pareto_plot import draw, require_matplotlib

    if args.png is not None:
        require_matplotlib()
    comparison = compare(args.artifacts)
    _say((comparison_json(comparison) if args.json else show_comparison(comparison)) + "\n")
    if args.png is not None:
        draw(comparison, Path(args.png))
    if args.html is not None:
        write_comparison(comparison, Path(args.html))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Decode, then say what came out and what was left behind."""
    from pressd.compress.convert import DTYPES, convert_to_dense
    from pressd.compress.tables import mebibytes

    dtype = None if args.dtype is None else DTYPES[args.dtype]
    converted = convert_to_dense(args.artifact, args.out, dtype=dtype, progress=ProgressLine().tell)
    if converted.drops_activations:
        sys.stderr.write(
            f"the rounding of activations is dropped: {args.artifact} computes with 8 bits of them, {args.out} with "
            f"all; the two will not answer exactly alike\n"
        )
    _say(f"{args.out}: {mebibytes(converted.bytes)} of weights in {converted.dtype}\n")
    return 0


def _factors(args: argparse.Namespace) -> "Factors":
    from pressd.compress.spending import Factors

    return Factors(grid_gco2_per_kwh=args.grid_gco2_per_kwh, price_per_hour=args.price_per_hour)


def _say(text: str) -> None:
    sys.stdout.write(text)
