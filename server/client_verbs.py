"""The verbs that talk to a server: generate, health, models. Like all verbs they write to stdout and stderr."""

import argparse
import json
import sys
from collections.abc import Iterator

from pressd.client import CallError, Client
from pressd.client.messages import DEFAULT_TARGET, GenerateOptions
from pressd.v1 import generate_pb2, model_pb2

# The texts of an answer as they come, then how it ended.
Parts = Iterator[str | generate_pb2.Finished]

# Seconds for questions that need no computing.
QUICK = 10.0


class VerbError(Exception):
    """A verb failed; the message is one line for the user."""


def add_parsers(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add one parser for each verb; each sets `run`."""
    generate = verbs.add_parser("generate", help="complete a prompt", description="Complete PROMPT (- reads stdin).")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, metavar="N")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (the model's default)")
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--seed", type=int, metavar="N")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    generate.add_argument("--chat", action="store_true", help="send PROMPT as a user's message")
    generate.add_argument("--no-stream", action="store_true", help="wait for the whole answer")
    generate.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long")
    generate.set_defaults(run=run_generate)
    health = verbs.add_parser("health", help="ask whether a server takes requests (exit status 0) or not (1)")
    health.set_defaults(run=run_health)
    models = verbs.add_parser("models", help="list what a server serves")
    models.set_defaults(run=run_models)
    for parser in (generate, health, models):
        parser.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help="(%(default)s)")
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_generate(args: argparse.Namespace) -> int:
    """Text on stdout as it arrives, statistics on stderr; with --json one object on stdout."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with Client(args.target, timeout=args.timeout) as client:
        try:
            asked = [{"role": "user", "content": prompt}] if args.chat else prompt
            if args.no_stream:
                completion = client.generate(asked, **_options(args)).completions[0]
                parts: Parts = iter((completion.text, completion.finished))
            else:
                parts = _parts(client.stream(asked, **_options(args)))
            finished = _show(parts, quiet=args.json)
        except CallError as error:
            raise _explained(error, args.target) from error
    if not args.json:
        sys.stderr.write(f"{_statistics(finished)}\n")
    return 0


def run_health(args: argparse.Namespace) -> int:
    """One word on stdout: ready or not ready."""
    with Client(args.target, timeout=QUICK) as client:
        try:
            ready = client.is_serving()
        except CallError as error:
            raise _explained(error, args.target) from error
    sys.stdout.write(f"{json.dumps({'ready': ready}) if args.json else 'ready' if ready else 'not ready'}\n")
    return 0 if ready else 1


def run_models(args: argparse.Namespace) -> int:
    """One line for each model."""
    with Client(args.target, timeout=QUICK) as client:
        try:
            models = client.models()
        except CallError as error:
            raise _explained(error, args.target) from error
    rows = [_describe(model) for model in models]
    lines = [json.dumps({"models": rows})] if args.json else [_line(row) for row in rows]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _options(args: argparse.Namespace) -> GenerateOptions:
    options = GenerateOptions()
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.temperature is not None:
        options["temperature"] = args.temperature
    if args.top_p is not None:
        options["top_p"] = args.top_p
    if args.seed is not None:
        options["seed"] = args.seed
    if args.stop is not None:
        options["stop"] = args.stop
    return options


def _parts(events: Iterator[generate_pb2.GenerateEvent]) -> Parts:
    """The texts of a stream, then its Finished."""
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "delta":
            yield event.delta.text
        elif kind == "finished":
            yield event.finished


def _show(parts: Parts, *, quiet: bool) -> generate_pb2.Finished:
    texts: list[str] = []
    finished: generate_pb2.Finished | None = None
    for part in parts:
        if not isinstance(part, str):
            finished = part
            continue
        texts.append(part)
        if not quiet:
            sys.stdout.write(part)
            sys.stdout.flush()
    if finished is None:
        raise VerbError("the stream ended without an end; the server was stopped")
    if quiet:
        sys.stdout.write(f"{json.dumps({'text': ''.join(texts)} | _facts(finished))}\n")
    elif not texts or not texts[-1].endswith("\n"):
        sys.stdout.write("\n")
    return finished


def _facts(finished: generate_pb2.Finished) -> dict[str, object]:
    timings = {field.name: round(value, 6) for field, value in finished.timings.ListFields()}
    return {
        "finish_reason": generate_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        "prompt_tokens": finished.usage.prompt_tokens,
        "completion_tokens": finished.usage.completion_tokens,
        "seed": finished.seed,
        "model_version": finished.model_version,
        "timings": timings,
    }


def _statistics(finished: generate_pb2.Finished) -> str:
    facts, timings = _facts(finished), finished.timings
    tokens = finished.usage.completion_tokens
    rate = f", {(tokens - 1) / timings.decode_seconds:.1f} tokens/s" if tokens > 1 and timings.decode_seconds else ""
    first = f", first after {timings.ttft_seconds * 1000:.0f} ms" if timings.HasField("ttft_seconds") else ""
    return (
        f"{facts['prompt_tokens']} + {tokens} tokens in {timings.total_seconds:.2f} s{first}{rate}, "
        f"ended by {facts['finish_reason']}, seed {finished.seed}"
    )


def _describe(model: model_pb2.Model) -> dict[str, object]:
    return {
        "name": model.name,
        "state": model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "architecture": model.architecture,
        "max_context": model.limits.max_context,
        "weights_bytes": model.memory.weights_bytes,
        "dense_bytes": model.memory.dense_bytes,
        "version": model.version,
    }


def _line(row: dict[str, object]) -> str:
    return "  ".join(str(value) if name == "name" else f"{name}={value}" for name, value in row.items())


def _explained(error: CallError, target: str) -> VerbError:
    if error.code.name == "UNAVAILABLE" and not error.reason:
        return VerbError(f"{target} does not answer; is `pressd serve` running there?")
    retry = f" (try again in {error.retry_after:g} s)" if error.retry_after else ""
    return VerbError(f"{error}{retry}")
