"""A client in JavaScript: gRPC and .proto files of another implementation, and none of our code."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import google.rpc
import pytest

pytestmark = pytest.mark.system

FOLDER = Path(__file__).parent / "node"
ROOT = Path(__file__).parent.parent.parent.parent
BUILD = ROOT / "build/node"
# The folder that google/rpc/*.proto are in.
GOOGLEAPIS = Path(next(iter(google.rpc.__path__))).parent.parent
INSTALL = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]


@pytest.fixture(scope="module")
def program() -> Path:
    """The client beside its packages, which are fetched once and again when package.json changes."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    wanted, have = (FOLDER / "package.json").read_bytes(), BUILD / "package.json"
    if not (have.is_file() and have.read_bytes() == wanted):
        shutil.rmtree(BUILD, ignore_errors=True)
        draft = BUILD.with_name("node.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        (draft / "package.json").write_bytes(wanted)
        done = subprocess.run(INSTALL, cwd=draft, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install: {done.stderr.strip().splitlines()[0]}")
        draft.rename(BUILD)
    return Path(shutil.copy(FOLDER / "stream.mjs", BUILD))


def run(program: Path, target: str, mode: str) -> None:
    arguments = ["node", str(program), target, str(ROOT / "protos"), str(GOOGLEAPIS), mode]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_streams_completions_and_reads_refusals(parrot: Any, program: Path) -> None:
    run(program, parrot.target, "whole")


def test_it_ends_calls_that_would_not_end(parrot: Any, program: Path) -> None:
    parrot.allow_steps(0)
    try:
        run(program, parrot.target, "held")
        parrot.await_metric(0, "pressd_kv_cache_blocks", state="used")
    finally:
        parrot.allow_all_steps()


def test_a_program_that_fails_is_seen(parrot: Any, program: Path) -> None:
    with pytest.raises(AssertionError, match=r"AssertionError|DEADLINE_EXCEEDED|UNAVAILABLE"):
        run(program, "127.0.0.1:1", "whole")
