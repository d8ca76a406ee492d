"""A directory appears complete or not at all: it is made beside its place under another name, then moved there."""

import contextlib
import glob
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
    out: Path, *, overwrite: bool, resume: Path | None = None, keeps: Callable[[], bool] | None = None
) -> Iterator[Path]:
    """Yield a directory to fill; it becomes `out` at the end, or is removed if anything at all goes wrong.

    It is new, or what `resume` names (see `unfinished`). Interrupted by the user, it stays if `keeps` says so. Raises
    ValueError as `check_target` does; it is asked again at the end, for the work between takes long.
    """
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(out, _PARTIAL)
    if resume is None:
        partial.mkdir()
    else:
        resume.replace(partial)  # under our number, so that nobody else takes it up
    try:
        yield partial
        check_target(out, overwrite=overwrite)
        _move(partial, out)
    except KeyboardInterrupt:
        if keeps is None or not keeps():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:
        # What went wrong first is what the user must see, not that its remains could not be removed.
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
    found = (out.parent.glob(f"{glob.escape(out.name)}.{what}-*") for what in (_PARTIAL, _REPLACED))
    return [path for paths in found for path in sorted(paths) if not psutil.pid_exists(_pid(path))]


def unfinished(out: Path) -> Path | None:
    """Return the work of the run for `out` that was killed last and can be taken up, None if there is none."""
    found = [path for path in leftovers(out) if path.name.startswith(f"{out.name}.{_PARTIAL}-") and has_begun(path)]
    return max(found, key=lambda path: (path / FOLDER / JOURNAL).stat().st_mtime_ns, default=None)


def sweep(folder: Path) -> None:
    """Remove files that were being written when their process was killed: hidden ones, named for their place."""
    for path in folder.glob(".*"):
        path.unlink()


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
    old = _sibling(out, _REPLACED)
    out.replace(old)
    try:
        partial.replace(out)
    except BaseException:
        old.replace(out)
        raise
    shutil.rmtree(old)


def _sibling(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}-{os.getpid()}")
