"""Who may call: bearer tokens from a file, and which methods need one that is an admin's."""

import asyncio
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from pressd.server.errors import admin_disabled, not_admin, unauthenticated
from pressd.server.reloaded import Reloaded

# Kubernetes' probes send no token.
OPEN = "/grpc.health.v1.Health/"
ADMIN = frozenset(
    f"/pressd.v1.Control/{method}" for method in ("LoadModel", "UnloadModel", "FlushPrefixCache", "Drain")
)
# Every call is compared with every token, so that its time tells nothing.
MAX_TOKENS = 1000
MIN_LENGTH, MAX_LENGTH = 16, 4096
# Seconds between two looks at the file.
LOOK_INTERVAL = 1.0

# The SHA-256 of a token, and whether it is an admin's.
Tokens = Mapping[bytes, bool]
Metadata = Iterable[tuple[str, str | bytes]]


class Access:
    """Decides by the tokens in a file, raising ValueError for a bad one; without a file all may call, none is admin."""

    def __init__(self, token_file: Path | None = None) -> None:
        self._file: Reloaded[Tokens] | None = None
        if token_file is not None:
            self._file = Reloaded("tokens", [token_file], lambda: read_tokens(token_file))

    def require(self, method: str, metadata: Metadata) -> None:
        """Raise Refusal unless a caller with this metadata may call the method of this full name."""
        if method.startswith(OPEN):
            return
        tokens = self._file.value if self._file is not None else {}
        is_admin = self._file is not None and _is_admin(tokens, metadata)
        if method in ADMIN and not is_admin:
            name = method.rpartition("/")[2]
            raise not_admin(name) if any(tokens.values()) else admin_disabled(name)

    async def follow(self) -> None:
        """Keep up with the file until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            if self._file is not None:
                await asyncio.to_thread(self._file.refresh)


def read_tokens(path: Path) -> Tokens:
    """Read a file of lines `TOKEN` or `TOKEN admin`, with comments from # on.

    Raises ValueError naming flag, file and line, and never a token.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--token-file {path}: {error.strerror}; give a file that the server may read") from None
    except UnicodeDecodeError:
        raise ValueError(f"--token-file {path} is not text; write one token a line") from None
    tokens: dict[bytes, bool] = {}
    for number, line in enumerate(lines, start=1):
        words = _words(line)
        if not words:
            continue
        token, *roles = words
        if roles not in ([], ["admin"]):
            raise ValueError(f"--token-file {path}, line {number}: after a token there may be `admin` and nothing else")
        if not MIN_LENGTH <= len(token) <= MAX_LENGTH or not all("!" <= character <= "~" for character in token):
            bounds = f"{MIN_LENGTH} to {MAX_LENGTH} visible ASCII characters"
            raise ValueError(f"--token-file {path}, line {number}: a token must have {bounds}")
        if _digest(token) in tokens:
            raise ValueError(f"--token-file {path}, line {number}: this token was there before; remove one of the two")
        tokens[_digest(token)] = bool(roles)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"--token-file {path} has {len(tokens)} tokens; write 1 to {MAX_TOKENS}, one a line")
    return tokens


def _words(line: str) -> list[str]:
    """The words before the first that begins with #."""
    words = line.split()
    return words[: next((n for n, word in enumerate(words) if word.startswith("#")), len(words))]


def _is_admin(tokens: Tokens, metadata: Metadata) -> bool:
    """Whether the caller is an admin; raises Refusal unless it has one of the tokens."""
    given = [value for key, value in metadata if key == "authorization"]
    if len(given) != 1:
        raise unauthenticated(f"send the metadata `authorization: Bearer TOKEN` once, not {len(given)} times")
    scheme, _, token = str(given[0]).partition(" ")
    if scheme.lower() != "bearer":
        raise unauthenticated("the metadata `authorization` must be `Bearer TOKEN`")
    digest, found = _digest(token.strip()), None
    for known, is_admin in tokens.items():
        if hmac.compare_digest(known, digest):
            found = is_admin
    if found is None:
        raise unauthenticated("the bearer token is not one of this server's")
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
