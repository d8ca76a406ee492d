"""The `pressd` command: its verbs, and what a failure looks like. What a verb needs is imported when it runs."""

import argparse
import dataclasses
import importlib.metadata
import os
import shlex
import signal
import sys
import traceback

from pressd.server import client_verbs, settings
from pressd.server.bench import verb as bench

ENGINE = "pressd.server.engine_process:load_engine"
FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(arguments: list[str] | None = None, *, engine: str = ENGINE) -> int:
    """Run one verb and return its exit status: 0 done, 1 failed with one line on stderr, 2 wrong usage, 3 gate missed.

    `engine` is an importable `module:function` that `serve` takes its engine from instead of its own.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    args.command = shlex.join(["pressd", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        if args.verb == "eval":
            _keep_code()
        status: int = run_serve(args, engine) if args.run is run_serve else args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has enough. What is still buffered has nowhere to go, also when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            sys.stderr.write(f"pressd {args.verb}: {_one_line(error)}\n")
        return FAILED


def run_serve(args: argparse.Namespace, engine: str) -> int:
    """Serve a model until a signal.

    It is fetched and pressed, if that is asked for, before a port is bound: until then nobody can connect, and a probe
    that is to tell a start from a failure must allow for it. What can be refused without the model is refused first.
    """
    from pressd.server import model_source, pressed_model

    try:
        told = settings.load(args)
        told.engine_config()
        scheme = None if told.scheme is None else pressed_model.scheme_named(told.scheme)
    except ValueError as error:
        sys.stderr.write(f"pressd serve: {error}\n")
        return USAGE
    from pressd.server import app, logs

    logs.configure(told.log_level)
    model = model_source.find_model(told.model)
    if scheme is not None:
        with pressed_model.ended_by_sigterm():
            name = model_source.default_name(told.model)
            model = pressed_model.pressed(model, scheme, settings.pressed_models(), name=name)
    return app.run(dataclasses.replace(told, model=model), _say, factory=engine)


def _keep_code() -> None:
    """Keep kernels that are generated for this CPU, as the server does."""
    from pressd.runtime.kernels.catalogue import use_code_cache

    use_code_cache(settings.code_cache())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    # The workshop's verbs are the one place where the door looks into it, and they load no torch before they run.
    from pressd.compress import verbs as workshop

    parser = argparse.ArgumentParser(prog="pressd", description="Press language models, serve them over gRPC.")
    parser.add_argument("--version", action="version", version=f"pressd {importlib.metadata.version('pressd')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    workshop.add_parsers(verbs)
    serve = verbs.add_parser(
        "serve",
        help="serve a model over gRPC",
        description="Serve MODEL. Every setting is also PRESSD_<NAME> in the environment and a key of --config.",
    )
    settings.add_arguments(serve)
    serve.set_defaults(run=run_serve)
    client_verbs.add_parsers(verbs)
    bench.add_parser(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show the trace of a failure")
    return parser


def _one_line(error: Exception) -> str:
    """A failure in one line; one that says nothing for itself is named by its kind."""
    text = " ".join(str(error).split())
    is_told = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("pressd.")
    return text if text and is_told else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())
