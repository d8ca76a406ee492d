"""The verb `generate`: a prompt in, completions out. Text goes to stdout as it arrives, statistics to stderr."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pressd.client import CallError, GenerateOptions
from pressd.server.bench.tables import aligned
from pressd.server.connecting import VerbError, add_target, connect, explained
from pressd.v1 import generate_pb2

# Flags that are options of the client.
OPTIONS = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "num_sequences"),
    *("stop", "json_schema", "regex", "choice"),
)
Events = Iterator[generate_pb2.GenerateEvent]


@dataclass(slots=True)
class Answer:
    """One completion as far as it has come."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    finished: Any = None


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `generate`, which sets `run`."""
    parser = verbs.add_parser("generate", help="complete a prompt", description="Complete PROMPT (- reads stdin).")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (the model's default)")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids what was said")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--n", type=int, metavar="N", dest="num_sequences", help="completions of the prompt (1)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=_schema, metavar="FILE|TEXT", help="answer with JSON of this schema")
    form.add_argument("--regex", metavar="REGEX", help="answer with what REGEX matches as a whole")
    form.add_argument("--choice", action="append", metavar="TEXT", help="answer with a TEXT given; may be repeated")
    parser.add_argument("--chat", action="store_true", help="send PROMPT as a user's message")
    parser.add_argument("--system", metavar="TEXT", help="send TEXT as a system's message before it; implies --chat")
    parser.add_argument("--logprobs", action="store_true", help="show each token's log-probability and rank")
    parser.add_argument("--no-stream", action="store_true", help="wait for the whole answer")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="answer with what there is by then")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_target(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Text on stdout as it arrives, statistics on stderr; with --json one object on stdout."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    asked: Any = prompt
    if args.chat or args.system is not None:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        asked = [*system, {"role": "user", "content": prompt}]
    with connect(args, timeout=args.timeout) as client:
        try:
            if args.no_stream:
                events = _events_of(client.generate(asked, **_options(args)))
            else:
                events = client.stream(asked, **_options(args))
            answers = _show(events, args)
        except CallError as error:
            raise explained(error, args.target) from error
    last = next(answer.finished for answer in answers if answer.finished.HasField("usage"))
    if args.json:
        completions = [_completion(answer, with_tokens=args.logprobs) for answer in answers]
        sys.stdout.write(f"{json.dumps({'completions': completions} | _facts(last))}\n")
    else:
        sys.stderr.write(f"{_statistics(last, [_reason(answer.finished) for answer in answers])}\n")
    return 0


def _options(args: argparse.Namespace) -> GenerateOptions:
    given = {name: getattr(args, name) for name in OPTIONS}
    given["logprobs"] = args.logprobs or None
    given["time_budget_ms"] = None if args.time_budget is None else round(1000 * args.time_budget)
    return cast(GenerateOptions, given)


def _schema(text: str) -> str:
    """The JSON schema itself, or what a file of that name holds."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}; give a file, or a schema that begins with {{") from None
    return text


def _events_of(response: generate_pb2.GenerateResponse) -> Events:
    """What a stream would have said of the same answer."""
    for index, completion in enumerate(response.completions):
        delta = generate_pb2.Delta(index=index, text=completion.text, tokens=completion.tokens)
        yield generate_pb2.GenerateEvent(delta=delta)
        yield generate_pb2.GenerateEvent(finished=completion.finished)


def _show(events: Events, args: argparse.Namespace) -> list[Answer]:
    """Print the first completion as it comes, and each other one once those before it are whole."""
    count = args.num_sequences or 1
    answers: dict[int, Answer] = defaultdict(Answer)
    write = _nothing if args.json else _write
    write(_heading(0, count))
    turn = 0
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "delta":
            answers[event.delta.index].texts.append(event.delta.text)
            answers[event.delta.index].tokens.extend(event.delta.tokens)
            if event.delta.index == turn:
                write(event.delta.text)
        elif kind == "finished":
            answers[event.finished.index].finished = event.finished
            while turn < count and answers[turn].finished is not None:
                write(_ending(answers[turn], args))
                turn += 1
                if turn < count:
                    write(_heading(turn, count) + "".join(answers[turn].texts))
    if turn < count:
        raise VerbError("the stream ended without an end; the server was stopped")
    return [answers[index] for index in range(count)]


def _nothing(text: str) -> None:
    """Print nothing: all comes in one object at the end."""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _heading(index: int, count: int) -> str:
    return "" if count == 1 else f"--- {index + 1} of {count}\n"


def _ending(answer: Answer, args: argparse.Namespace) -> str:
    """What comes after an answer's text."""
    lines = [] if "".join(answer.texts).endswith("\n") else [""]
    if args.logprobs:
        rows = [(_token(token), f"{token.logprob:.4f}", str(token.rank)) for token in answer.tokens]
        lines += aligned([("token", "logprob", "rank"), *rows])
    return "".join(f"{line}\n" for line in lines)


def _token(token: Any) -> str:
    """A token's text as Python writes it, or its id where there is no text."""
    return repr(token.text) if token.HasField("text") else str(token.id)


def _completion(answer: Answer, *, with_tokens: bool) -> dict[str, object]:
    found: dict[str, object] = {"text": "".join(answer.texts), "finish_reason": _reason(answer.finished)}
    matched = answer.finished.WhichOneof("matched")
    if matched is not None:
        found[f"matched_{matched}"] = getattr(answer.finished, matched)
    if with_tokens:
        found["tokens"] = [
            {"id": token.id, "text": token.text, "logprob": token.logprob, "rank": token.rank}
            for token in answer.tokens
        ]
    return found


def _reason(finished: Any) -> str:
    return generate_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()


def _facts(last: Any) -> dict[str, object]:
    return {
        "prompt_tokens": last.usage.prompt_tokens,
        "completion_tokens": last.usage.completion_tokens,
        "cached_prompt_tokens": last.usage.cached_prompt_tokens,
        "seed": last.seed,
        "model_version": last.model_version,
        "timings": {field.name: round(value, 6) for field, value in last.timings.ListFields()},
    }


def _statistics(last: Any, reasons: list[str]) -> str:
    timings, tokens = last.timings, last.usage.completion_tokens
    rate = f", {(tokens - 1) / timings.decode_seconds:.1f} tokens/s" if tokens > 1 and timings.decode_seconds else ""
    first = f", first after {timings.ttft_seconds * 1000:.0f} ms" if timings.HasField("ttft_seconds") else ""
    return (
        f"{last.usage.prompt_tokens} + {tokens} tokens in {timings.total_seconds:.2f} s{first}{rate}, "
        f"ended by {', '.join(dict.fromkeys(reasons))}, seed {last.seed}"
    )
