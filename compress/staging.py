"""A directory appears complete or not at all: it is made beside its place under another name, then moved there."""

import contextlib
import fcntl
import glob
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pressd.compress.journal import NAME as JOURNAL
from pressd.compress.journal import has_begun
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import FOLDER, is_artifact, read_manifest

_PARTIAL, _REPLACED = "partial", "replaced"


@contextlib.contextmanager
def staged(
    out: Path,
    *,
    overwrite: bool,
    journaled: bool = False,
    resume: Path | None = None,
    keeps: Callable[[Path, BaseException], bool] | None = None,
) -> Iterator[Path]:
    """Yield a directory to fill; it becomes `out` at the end, or is removed if anything at all goes wrong.

    It is new, or what `resume` names (see `unfinished`). One that is `journaled` has the folder of its journal and is
    locked: while this process lives, nobody takes it up. After an error it stays if `keeps` says so. Raises ValueError
    as `check_target` does, which is asked again at the end, for the work between takes long; and where somebody else
    has taken `resume` up.
    """
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        if resume is None:
            partial = _new_directory(out)
            if journaled:
                (partial / FOLDER).mkdir()
                locks.enter_context(_lock_new(partial))
        else:
            partial = resume
            locks.enter_context(_lock_left(partial))
        try:
            yield partial
            check_target(out, overwrite=overwrite)
            _move(partial, out)
        except BaseException as error:
            # What went wrong first is what the user must see, not that its remains could not be removed.
            if keeps is None or not keeps(partial, error):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse to put an artifact where something else is; raises ValueError with the way out."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is not a directory; give another place")
    if not _has_content(out):
        return
    if not is_artifact(out):
        raise ValueError(f"{out} holds something that is no artifact of pressd; give an empty or a new directory")
    if not overwrite:
        raise ValueError(f"{out} holds an artifact already; give --overwrite to replace it, or another directory")
    stray = _stray(out)
    if stray is not None:
        raise ValueError(f"{stray} is not part of the artifact beside it; move it away, or give another directory")


def leftovers(out: Path) -> list[Path]:
    """Return what runs for `out` that were killed have left beside it: unfinished work, and an artifact put aside."""
    partial, replaced = (sorted(out.parent.glob(f"{glob.escape(out.name)}.{what}-*")) for what in (_PARTIAL, _REPLACED))
    return [
        *(path for path in partial if not _is_live(path)),
        *(path for path in replaced if not psutil.pid_exists(_pid(path))),
    ]


def unfinished(out: Path) -> Path | None:
    """Return the work of the run for `out` that was killed last and can be taken up, None if there is none."""
    found = [path for path in leftovers(out) if path.name.startswith(f"{out.name}.{_PARTIAL}-") and has_begun(path)]
    return max(found, key=lambda path: (path / FOLDER / JOURNAL).stat().st_mtime_ns, default=None)


def sweep(folder: Path) -> None:
    """Remove files that were being written when their process was killed: hidden ones, named for their place."""
    for path in folder.glob(".*"):
        path.unlink()


@contextlib.contextmanager
def _lock_new(partial: Path) -> Iterator[None]:
    """Lock a new directory by its journal, which is made for that.

    Some network file systems know no locks: nobody can take a directory up there, which is as safe.
    """
    with (partial / FOLDER / JOURNAL).open("xb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for nobody but who just looks whether it is locked
        yield


@contextlib.contextmanager
def _lock_left(partial: Path) -> Iterator[None]:
    """Lock a directory that was left; raises ValueError if somebody else has it, or has finished or removed it."""
    taken = f"cannot resume: another process has taken up {partial}; wait for it, or press without --resume"
    path = partial / FOLDER / JOURNAL
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        raise ValueError(taken) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(taken) from None
        # Between opening and locking, whoever had it may have moved it to its place.
        if not path.is_file() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise ValueError(taken)
        yield


def _is_live(left: Path) -> bool:
    """Whether a process still works on it: it holds the lock, or, where there is none, has the number in its name.

    A lock is sure, a number is not: every process in a container may be number 1, and other machines share the disk.
    """
    try:
        file = (left / FOLDER / JOURNAL).open("r+b")
    except OSError:
        return psutil.pid_exists(_pid(left))
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return psutil.pid_exists(_pid(left))
    return False


def _pid(left: Path) -> int:
    """Number of the process that makes it; our own, which exists, if the name is somebody else's."""
    number = left.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else os.getpid()


def _has_content(path: Path) -> bool:
    return path.exists() and any(path.iterdir())


def _stray(artifact: Path) -> Path | None:
    """Return something in the directory that its manifest does not list, so that replacing it would lose it."""
    try:
        manifest = read_manifest(artifact)
    except ArtifactError as error:
        raise ValueError(f"{artifact} cannot be replaced ({error}); remove it, or give another directory") from None
    assert manifest is not None
    known = {FOLDER, *manifest.files}
    return next((path for path in sorted(artifact.iterdir()) if path.name not in known), None)


def _move(partial: Path, out: Path) -> None:
    if not _has_content(out):
        partial.replace(out)
        return
    old = next(path for path in _siblings(out, _REPLACED) if not path.exists())
    out.replace(old)
    try:
        partial.replace(out)
    except BaseException:
        old.replace(out)
        raise
    shutil.rmtree(old)


def _new_directory(out: Path) -> Path:
    for path in _siblings(out, _PARTIAL):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is no end of names")


def _siblings(out: Path, what: str) -> Iterator[Path]:
    """Names that tell our number; a process that was killed may have had the same, and left what has the first."""
    yield out.with_name(f"{out.name}.{what}-{os.getpid()}")
    for count in itertools.count(2):
        yield out.with_name(f"{out.name}.{what}-{count}-{os.getpid()}")
