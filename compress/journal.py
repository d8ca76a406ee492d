"""`pressd/journal.jsonl`: what a run was asked to do, then a line per finished block: the state of a run. No torch.

The first line is a fingerprint. A line is written when everything it speaks of is on disk, so a run that was killed at
any moment can be taken up after its last whole line; digests show whether the files still hold what they held.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pressd.runtime.artifact.manifest import FOLDER, PlannedGroup

NAME = "journal.jsonl"
Fingerprint = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLine:
    """One finished block: its groups, and the digest of every tensor."""

    block: str
    groups: tuple[PlannedGroup, ...]
    sha256: Mapping[str, str]


class Journal:
    """The journal of the run that goes on in a directory; a context manager."""

    def __init__(self, directory: Path, fingerprint: Fingerprint) -> None:
        """Open or begin the journal; raises ValueError naming what is not as it was when the journal was begun."""
        self._path = directory / FOLDER / NAME
        self._fingerprint = fingerprint
        self.finished: tuple[BlockLine, ...] = ()
        self._end = 0
        if self._path.is_file():
            self._read()

    def __enter__(self) -> "Journal":
        self._file: BinaryIO = self._path.open("r+b" if self._path.exists() else "wb")
        try:
            self._file.truncate(self._end)  # a line that was not finished
            self._file.seek(self._end)
            if not self._end:
                self._write({"fingerprint": self._fingerprint})
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: BlockLine) -> None:
        """Say that a block is finished and on disk."""
        groups = [group.model_dump(mode="json") for group in line.groups]
        self._write({"block": line.block, "groups": groups, "sha256": dict(line.sha256)})

    def _write(self, content: dict[str, object]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        """Take in all whole lines; the first that is none ends it."""
        finished = []
        for number, (content, end) in enumerate(_whole_lines(self._path)):
            if number == 0:
                _check_same(content.get("fingerprint"), self._fingerprint)
            else:
                groups = tuple(PlannedGroup.model_validate(group) for group in content["groups"])
                finished.append(BlockLine(block=content["block"], groups=groups, sha256=content["sha256"]))
            self._end = end
        self.finished = tuple(finished)


def has_begun(directory: Path) -> bool:
    """Whether a directory holds a run that can be taken up: one whose fingerprint was written."""
    path = directory / FOLDER / NAME
    return path.is_file() and next(_whole_lines(path), None) is not None


def holds_work(directory: Path) -> bool:
    """Whether a directory holds a run that has finished a block."""
    return sum(1 for _ in itertools.islice(_whole_lines(directory / FOLDER / NAME), 2)) == 2


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (content, where it ends) of every line up to the first that is not whole."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
            except ValueError:
                return
            yield content, end


def _check_same(then: object, now: Fingerprint) -> None:
    if not isinstance(then, dict):
        raise ValueError("the run that was interrupted left no fingerprint; press without --resume")
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            raise ValueError(
                f"cannot resume: {key} was {then.get(key)!r} when the run began and is {now.get(key)!r} now; make it "
                f"the same, or press without --resume"
            )
