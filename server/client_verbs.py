"""The verbs that talk to a server: generate, health, models. Like all verbs they write to stdout and stderr."""

import argparse
import json
import sys
from typing import Any

from pressd.client import CallError
from pressd.server import generate_verb
from pressd.server.bench.tables import aligned
from pressd.server.connecting import add_target, connect, explained
from pressd.v1 import model_pb2

# Seconds for questions that need no computing.
QUICK = 10.0
MIB = 1 << 20


def add_parsers(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add one parser for each verb; each sets `run`."""
    generate_verb.add_parser(verbs)
    health = verbs.add_parser("health", help="ask whether a server takes requests (exit status 0) or not (1)")
    health.add_argument("--watch", action="store_true", help="tell it now and whenever it changes")
    health.set_defaults(run=run_health)
    models = verbs.add_parser("models", help="list what a server serves, and what was done to the weights")
    models.set_defaults(run=run_models)
    for parser in (health, models):
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        add_target(parser)


def run_health(args: argparse.Namespace) -> int:
    """One word on stdout: ready or not ready. What is asked is how it is now, so nothing is tried again."""
    ready = False
    with connect(args, timeout=QUICK, retry=None) as client:
        try:
            for ready in client.watch_serving() if args.watch else [client.is_serving()]:
                word = json.dumps({"ready": ready}) if args.json else "ready" if ready else "not ready"
                sys.stdout.write(f"{word}\n")
                sys.stdout.flush()
        except CallError as error:
            raise explained(error, args.target) from error
    return 0 if ready else 1


def run_models(args: argparse.Namespace) -> int:
    """One line for each model."""
    with connect(args, timeout=QUICK) as client:
        try:
            rows = [_describe(model) for model in client.models()]
        except CallError as error:
            raise explained(error, args.target) from error
    lines = [json.dumps({"models": rows})] if args.json else _table(rows)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _describe(model: model_pb2.Model) -> dict[str, Any]:
    """The facts of a model; None for what is not known, such as all of one that is still loading."""
    compression = model.compression
    sizes = (compression.dense_bytes, compression.artifact_bytes)
    quality = dict(compression.quality)
    return {
        "name": model.name,
        "state": model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "architecture": model.architecture or None,
        "max_context": model.limits.max_context or None,
        "schemes": list(dict.fromkeys(layer.scheme for layer in compression.layers)),
        "bits_per_weight": compression.bits_per_weight or None,
        "ratio": sizes[0] / sizes[1] if all(sizes) else None,
        "kl_mean": quality.get("kl_mean"),
        "top1_agreement": quality.get("top1_agreement"),
        "weights_bytes": model.memory.weights_bytes or None,
        "dense_bytes": model.memory.dense_bytes or None,
        "version": model.version or None,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("name", "state", "architecture", "context", "weights", "scheme", "bits", "ratio", "KL", "top-1", "version")
    cells = [
        (
            row["name"],
            row["state"],
            row["architecture"] or "-",
            _number(row["max_context"], ","),
            "-" if row["weights_bytes"] is None else f"{row['weights_bytes'] / MIB:,.1f} MiB",
            ", ".join(row["schemes"]) or "-",
            _number(row["bits_per_weight"], ".2f"),
            _number(row["ratio"], ".2f"),
            _number(row["kl_mean"], ".5f"),
            _number(row["top1_agreement"], ".1%"),
            (row["version"] or "-")[:12],
        )
        for row in rows
    ]
    return aligned([head, *cells])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
