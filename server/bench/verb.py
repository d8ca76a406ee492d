"""The verb `bench`: its arguments, and what happens with them. Loads no torch before it runs."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pressd.server.bench import tables
from pressd.server.bench.load import Run, Target, drive
from pressd.server.bench.measures import summarize
from pressd.server.bench.workload import Arrivals, Clients, Pace, Span, make_requests
from pressd.server.settings import OPTIONS, code_cache

if TYPE_CHECKING:
    from pressd.runtime.config import EngineConfig

USAGE, INTERRUPTED = 2, 128 + signal.SIGINT
# Settings of the engine that are told as `serve` is told them.
SHARED = ("device", "dtype", "kernels", "kv_dtype", "kv_memory", "max_batch", "max_step_tokens")
ENGINE = (*SHARED, "threads", "target_itl")
CONNECTION = ("tls", "tls_ca", "tls_cert", "tls_key", "token_file", "plaintext_token")
WARMUP_TOKENS = 4


class BenchError(Exception):
    """The measurement makes no sense; one line for the user."""


class Info(Protocol):
    """What must be known of a model before it is measured."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def weights_bytes(self) -> int: ...


class Measured(Target, Protocol):
    """A target that knows its model."""

    @property
    def info(self) -> Info: ...


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `bench`, which sets `run`."""
    parser = verbs.add_parser(
        "bench",
        help="measure rates and latencies of a model under load",
        description="Send random prompts to a model and measure what its users would wait for. Answers are greedy and "
        "have the length asked for. Times count from when a request should have been sent.",
    )
    from pressd.server.connecting import add_connection, target  # with grpc, which `verb` itself can do without

    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", metavar="HOST:PORT", type=target, help="a running server, or dns:///, unix:")
    what.add_argument("--in-process", metavar="DIR", type=Path, help="a model directory, in an engine in this process")
    what.add_argument(
        "--compare", metavar="DIR", type=Path, nargs="+", help="several, in turns, each with the same requests"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--clients", metavar="N", type=_whole, default=1, help="requests under way at any time (1)")
    load.add_argument("--rate", metavar="R", type=_positive, help="requests a second, at random times, instead")
    parser.add_argument("--requests", metavar="N", type=_whole, default=32, help="(%(default)s)")
    span = _typed(Span.parse)
    parser.add_argument("--prompt-tokens", metavar="N[-M]", type=span, default=Span(128, 128), help="(128)")
    parser.add_argument("--output-tokens", metavar="N[-M]", type=span, default=Span(64, 64), help="(64)")
    parser.add_argument("--rounds", metavar="N", type=_whole, default=3, help="of --compare, all requests in each (3)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of prompts, lengths and times (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    engine = parser.add_argument_group("engine, for --in-process and --compare")
    for name in SHARED:
        option = OPTIONS[name]
        engine.add_argument(_flag(name), metavar=option.metavar, type=_typed(option.parse), help=option.help)
    engine.add_argument("--threads", metavar="N", type=_whole, help="threads of PyTorch (its own choice)")
    engine.add_argument(
        "--target-itl", metavar="SECONDS", type=_positive, help="how long a step may keep others waiting (no bound)"
    )
    add_connection(parser)
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Figures on stdout, progress on stderr; what was measured before an interrupt is printed too."""
    try:
        _check_usage(args)
        config = None if args.target else _engine_config(args)
    except ValueError as error:
        sys.stderr.write(f"pressd bench: {error}\n")
        return USAGE
    with contextlib.ExitStack() as stack:
        if config is None:
            labels, targets = [str(args.target)], [_over_grpc(args, stack)]
        else:
            paths: list[Path] = args.compare or [args.in_process]
            labels, targets = [str(path) for path in paths], [_in_process(args, path, config) for path in paths]
        runs: list[list[Run]] = [[] for _ in targets]
        is_whole = measure(targets, labels, args, runs)
    found = [summarize(own) for own in runs]
    errors = [s.error for own in runs for run in own for s in run.samples if s.error is not None]
    if errors:
        sys.stderr.write(f"{len(errors)} requests failed; the first: {errors[0]}\n")
    if args.compare:
        for label, target, row, own in zip(labels, targets, found, runs, strict=True):
            row |= {"artifact": label, "weights_bytes": target.info.weights_bytes}
            row["rounds_tokens_per_s"] = tables.rates(own)
        answer = json.dumps({"artifacts": found}) + "\n" if args.json else tables.several(found)
    else:
        answer = json.dumps(found[0]) + "\n" if args.json else tables.one(found[0])
    sys.stdout.write(answer)
    return 0 if is_whole else INTERRUPTED


def _check_usage(args: argparse.Namespace) -> None:
    if args.compare and len(args.compare) < 2:
        raise ValueError("--compare has one directory; give two or more, or --in-process")
    told = CONNECTION if args.target is None else ENGINE
    misplaced = [_flag(name) for name in told if getattr(args, name) not in (None, False)]
    if misplaced:
        what = "are about a server: they need --target" if args.target is None else "are settings of the server's own"
        raise ValueError(f"{', '.join(misplaced)}: these {what}; leave them out")


def _over_grpc(args: argparse.Namespace, stack: contextlib.ExitStack) -> Measured:
    from pressd.client import CallError
    from pressd.server.bench.over_grpc import OverGrpc
    from pressd.server.connecting import explained, reached

    try:
        target = stack.enter_context(OverGrpc(args.target, **reached(args)))
    except CallError as error:
        raise explained(error, args.target) from None
    _check_lengths(args, args.target, target.info.max_context)
    return target


def _in_process(args: argparse.Namespace, path: Path, config: "EngineConfig") -> Measured:
    from pressd.server.bench.in_process import InProcess

    target = InProcess(path, config)
    _check_lengths(args, path, target.info.max_context)
    return target


def measure(targets: Sequence[Measured], labels: list[str], args: argparse.Namespace, runs: list[list[Run]]) -> bool:
    """Add to the runs of each target; return False if interrupted.

    Every round sends all targets the same requests, one target after the other.
    """
    vocab_size = min(target.info.vocab_size for target in targets)
    for number in range(args.rounds if args.compare else 1):
        seed = f"{args.seed} {number}"  # requests of an earlier round would be found in the prefix cache
        requests = make_requests(
            args.requests, prompt=args.prompt_tokens, output=args.output_tokens, vocab_size=vocab_size, seed=seed
        )
        pace: Pace = Clients(args.clients)
        if args.rate is not None:
            pace = Arrivals.poisson(args.rate, args.requests, f"arrivals {seed}")
        for target, label, own in zip(targets, labels, runs, strict=True):
            if number == 0 and not _warm_up(target, args, vocab_size).is_whole:
                return False
            own.append(drive(target, requests, pace, tell=tables.progress(label)))
            if not own[-1].is_whole:
                return False
    return True


def _warm_up(target: Measured, args: argparse.Namespace, vocab_size: int) -> Run:
    """Have kernels prepare what they prepare when they first meet a shape."""
    clients = Clients(args.clients)
    requests = make_requests(
        clients.count,
        prompt=args.prompt_tokens,
        output=Span(WARMUP_TOKENS, WARMUP_TOKENS),
        vocab_size=vocab_size,
        seed="warm-up",
    )
    return drive(target, requests, clients)


def _check_lengths(args: argparse.Namespace, label: object, max_context: int) -> None:
    needed = args.prompt_tokens.most + max(args.output_tokens.most, WARMUP_TOKENS)
    if needed > max_context:
        raise BenchError(
            f"{label}: --prompt-tokens and --output-tokens need a context of {needed}, and it has {max_context}"
        )


def _engine_config(args: argparse.Namespace) -> "EngineConfig":
    from pressd.runtime.config import EngineConfig

    given = {name: getattr(args, name) for name in ENGINE}
    told = {name: value for name, value in given.items() if value is not None}
    return EngineConfig(**told, code_cache=str(code_cache()))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What argparse takes for a type; it shows the messages of no other errors."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
