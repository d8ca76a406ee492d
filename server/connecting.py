"""How the verbs that talk to a server are told where it is and who asks."""

import argparse
from pathlib import Path
from typing import TypedDict

from pressd.client import CallError, Client, Retry, Tls
from pressd.client.connection import DEFAULT_TARGET, check_target
from pressd.client.retry import DEFAULT_RETRY


class VerbError(Exception):
    """A verb failed; the message is one line for the user."""


class Reached(TypedDict):
    """What both clients are told besides target, times and retries."""

    tls: Tls | bool
    token: str | None
    plaintext_token: bool


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `reached` reads."""
    flags = parser.add_argument_group("connection to the server")
    flags.add_argument("--tls", action="store_true", help="encrypt, and trust the public certificate authorities")
    flags.add_argument("--tls-ca", metavar="FILE", type=Path, help="encrypt, and trust these authorities (PEM)")
    flags.add_argument("--tls-cert", metavar="FILE", type=Path, help="certificate to show to the server (PEM)")
    flags.add_argument("--tls-key", metavar="FILE", type=Path, help="its private key (PEM)")
    flags.add_argument("--token-file", metavar="FILE", type=Path, help="send the first token of FILE")
    flags.add_argument("--plaintext-token", action="store_true", help="send it even where others can read it")


def target(text: str) -> str:
    """Stand for the type of `--target` in argparse."""
    try:
        return check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add `--target` and what goes with it."""
    parser.add_argument(
        "--target", default=DEFAULT_TARGET, type=target, metavar="HOST:PORT", help="or dns:///, unix: (%(default)s)"
    )
    add_connection(parser)


def reached(args: argparse.Namespace) -> Reached:
    """Return what the flags say; raises ValueError, which never repeats a token."""
    files = {"ca": args.tls_ca, "cert": args.tls_cert, "key": args.tls_key}
    tls = Tls(**files) if any(files.values()) else bool(args.tls)
    token = None if args.token_file is None else _first_token(args.token_file)
    return Reached(tls=tls, token=token, plaintext_token=args.plaintext_token)


def connect(args: argparse.Namespace, *, timeout: float | None, retry: Retry | None = DEFAULT_RETRY) -> Client:
    """Return a client of the server that the flags name; raises ValueError."""
    return Client(args.target, timeout=timeout, retry=retry, **reached(args))


def _first_token(path: Path) -> str:
    """The first word of the first line that is neither empty nor a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--token-file {path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError:
        raise ValueError(f"--token-file {path} is not text; write one token a line") from None
    tokens = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise ValueError(f"--token-file {path} has no token; write one a line")
    return tokens[0]


def explained(error: CallError, target: str) -> VerbError:
    """A failed call in one line."""
    if error.code.name == "UNAVAILABLE" and not error.reason:
        cause = f" ({error.message.rpartition(': ')[2]})" if "andshake" in error.message else ""
        return VerbError(f"{target} does not answer{cause}; is `pressd serve` running there?")
    retry = f" (try again in {error.retry_after:g} s)" if error.retry_after else ""
    return VerbError(f"{error}{retry}")
