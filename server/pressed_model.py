"""Presses a model before it is served, once: what came out is kept, and found by the next start.

A start holds a lock while it looks and presses, so that of several starts one presses and the others wait. The lock is
the kernel's and ends with its holders, which are the start and the process that presses.
"""

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import read_manifest

log = logging.getLogger("pressd.press")

PROGRAM = ("-m", "pressd.server.press_process")
# A start waits for it, and the model may have no tokenizer: to nearest, without text.
HOW = ("--pass", "rtn")
# How a verb says what went wrong.
_FAILURE = "pressd compress: "
# Of a file that is larger than all samples, so many bytes at so many places tell it from others of its size.
_SAMPLE_BYTES, _NUM_SAMPLES = 64 << 10, 16


class PressError(ValueError):
    """The model cannot be pressed; one line for the user."""


def scheme_named(name: str) -> str:
    """Return a scheme's name in its one spelling; raises ValueError."""
    from pressd.runtime.artifact.schemes import parse_scheme

    return parse_scheme(name).name


def pressed(source: Path, scheme: str, cache: Path, *, name: str) -> Path:
    """Return the directory in `cache` that `source` is pressed into by this scheme; press if it is not there.

    `name` begins the directory's. Raises PressError. A signal that raises an exception ends the pressing, and what it
    has made is removed.
    """
    _require_dense(source, scheme)
    out = cache / f"{name}-{scheme}-{_identity(source, scheme)[:16]}"
    with _alone(out) as lock:
        if _is_sound(out):
            log.info("pressed before", extra={"path": str(out)})
            return out
        _remove_remains(out)
        try:
            _press(source, scheme, out, lock)
        except BaseException:
            _remove_remains(out)
            raise
    log.info("pressed", extra={"path": str(out)})
    return out


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """For the length of a block, let SIGTERM end the program as an exception does: with its cleaning up."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_dense(source: Path, scheme: str) -> None:
    if not source.is_dir():
        raise PressError(f"{source} is not a directory; give a Hugging Face model to press as {scheme}")
    manifest = read_manifest(source)
    if manifest is not None:
        schemes = ", ".join(sorted({group.scheme for group in manifest.plan}))
        raise PressError(f"{source} is pressed already ({schemes}); leave out -s, or give the model it was made from")


def _identity(source: Path, scheme: str) -> str:
    """Return a digest that differs when something else would come out, without reading all of large files."""
    version = importlib.metadata.version("pressd")
    digest = hashlib.sha256(f"{version}\n{scheme}\n{source.resolve()}\n".encode())
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        # Images and package managers set the times of files to a constant.
        with path.open("rb") as file:
            for begin in _places(status.st_size):
                file.seek(begin)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    """Where to read samples: everywhere in a small file, else spread from its first byte to its last."""
    if size <= _SAMPLE_BYTES * _NUM_SAMPLES:
        return list(range(0, size, _SAMPLE_BYTES))
    return [number * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)]


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[IO[bytes]]:
    """Hold the lock of `out` for the length of a block, and wait for it if another has it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Never removed: a lock on a file that is gone keeps out nobody.
    with out.with_name(f"{out.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another start that presses the same", extra={"path": str(out)})
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _is_sound(out: Path) -> bool:
    """Whether a finished artifact is there with all its files in their size; the engine checks more when it loads."""
    try:
        manifest = read_manifest(out)
        if manifest is None:
            return False
        for name, file in manifest.files.items():
            if (out / name).stat().st_size != file.bytes:
                raise ArtifactError(f"{out / name} has not the size that the manifest says")
    except (ArtifactError, OSError) as error:
        log.warning("pressing again", extra={"cause": str(error)})
        return False
    return True


def _remove_remains(out: Path) -> None:
    """Remove what is no sound artifact, and what presses that were killed have left: the lock says they are gone."""
    partial = (out.parent.glob(f"{glob.escape(out.name)}.{what}-*") for what in ("partial", "replaced"))
    for path in (out, *(path for paths in partial for path in paths)):
        if path.exists():
            shutil.rmtree(path)


def _press(source: Path, scheme: str, out: Path, lock: IO[bytes]) -> None:
    """Press in a process of its own; raises PressError with its last words."""
    log.info("pressing", extra={"source": str(source), "scheme": scheme, "path": str(out)})
    command = [sys.executable, *PROGRAM, str(source.resolve()), "--scheme", scheme, *HOW, "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[lock.fileno()],
        text=True,
        errors="replace",
    )
    failure = None
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(_FAILURE):
                failure = line.removeprefix(_FAILURE).strip()
            else:
                log.info("pressing", extra={"progress": line.strip()})
        status = process.wait()
    finally:
        process.kill()
        process.communicate()
    if status != 0:
        cause = failure or (f"ended by signal {-status}" if status < 0 else f"ended with status {status}")
        raise PressError(f"{source} cannot be pressed as {scheme}: {cause}")
