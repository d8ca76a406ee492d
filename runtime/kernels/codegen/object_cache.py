"""Compiled kernels, kept between runs by the content of what they were compiled from.

Machine code is as trusted as the program itself: it is read only from a directory that belongs to this user and that
nobody else can write to, and only if its digest is the one it was written with.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from pressd.runtime.kernels.codegen.target import Vectors

DIGEST_BYTES = 32
_directory: Path | None = None


def use(directory: Path | None) -> None:
    """Keep compiled code in this directory from now on; None: nowhere."""
    global _directory
    _directory = directory


def look_up(text: str, vectors: Vectors) -> bytes | None:
    """Return the object file of some IR, or None if it was never kept, or is not to be trusted."""
    if _directory is None or not _is_ours(_directory):
        return None
    try:
        content = (_directory / _name(text, vectors)).read_bytes()
    except OSError:
        return None
    digest, image = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def keep(text: str, vectors: Vectors, image: bytes) -> None:
    """Keep an object file, if there is a place for it."""
    if _directory is None:
        return
    try:
        _directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(_directory):
            return
        # Half a file, on a full disk say, goes with its folder.
        with tempfile.TemporaryDirectory(dir=_directory) as folder:
            half = Path(folder, "half")
            half.write_bytes(hashlib.sha256(image).digest() + image)
            half.replace(_directory / _name(text, vectors))
    except OSError:
        return  # a full disk, or one that is read only: what was compiled is in memory all the same


def _name(text: str, vectors: Vectors) -> str:
    key = "\0".join((text, repr(vectors), llvmlite.__version__, repr(llvm.llvm_version_info)))
    return f"{hashlib.sha256(key.encode()).hexdigest()}.o"


def _is_ours(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & others
