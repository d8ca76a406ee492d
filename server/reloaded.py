"""A value that is written in files, and read again when they change."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
# What changes when a file does: also when a symbolic link to it is turned, or its permissions are mended.
Stamp = tuple[int, int, int, int, int] | None

log = logging.getLogger("pressd.files")


class Reloaded(Generic[T]):
    """What `read` makes of files; it raises ValueError for what it cannot read, at first here and later never.

    A change to something that cannot be read leaves the last good value in use; each new complaint is logged once.
    Refresh from one thread at a time.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._read = read
        self._seen = self._stamps()
        self._complaint = ""
        self.value = read()

    def refresh(self) -> bool:
        """Read the files if they changed since the last look; return whether that gave another value."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        try:
            value = self._read()
        except (ValueError, OSError) as error:
            # The next look tries again: the trouble may be passing, like a process without free descriptors.
            is_news = str(error) != self._complaint and self._stamps() == stamps  # else they are just being replaced
            if is_news:
                self._complaint = str(error)
                log.error("changed files are not used", extra={"what": self._what, "cause": self._complaint})
            return False
        self._seen, self._complaint = stamps, ""
        if value == self.value:
            return False
        self.value = value
        log.info("changed files are in use", extra={"what": self._what})
        return True

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
