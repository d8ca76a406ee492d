"""Runs that are killed: processes that press and end themselves by SIGKILL before the n-th thing they do.

What they do are calls, Python's own and those of C functions, as the interpreter tells them to a profiler: any of
them, or those alone that touch files. So the moments are between start and end however fast the machine is, and the
same in every run. They may also be killed from outside after so many milliseconds, wherever they are then. One process
imports everything once and is forked for each run.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

KILLED = -9
Kind = Literal["any", "files", "time"]

PROGRAM = r"""
import json, os, select, signal, sys, tempfile, time, traceback
import torch
torch.set_num_threads(1)
from pressd.compress import compress

FILES = {
    "open", "write", "flush", "close", "truncate", "fsync", "flock", "mkdir", "replace", "rename", "unlink", "rmdir",
    "rmtree", "copyfile", "write_text", "sync", "_write",
}

def press(job):
    left = job["at"]
    kind = job["kind"]
    def count(frame, event, arg):
        nonlocal left
        if event == "c_call":
            name = arg.__name__
        elif event == "call":
            name = frame.f_code.co_name
        else:
            return
        if kind == "any" or name in FILES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    if kind != "time":
        sys.setprofile(count)
    try:
        compress(job["source"], job["recipe"], job["out"], shard_bytes=job["shard_bytes"],
                 overwrite=job["overwrite"], resume=job["resume"])
    finally:
        sys.setprofile(None)
    return job["at"] - left

with tempfile.TemporaryDirectory() as folder:  # what is made or read once is there when the first is forked
    compress(*sys.argv[1:3], f"{folder}/out")
for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, str(press(job)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    if job["kind"] == "time":
        limit = None if job["at"] < 0 else job["at"] / 1000
        if not select.select([reading], [], [], limit)[0]:
            os.kill(child, signal.SIGKILL)
    told = os.read(reading, 100).decode()
    if job["kind"] == "time":
        told = round(1000 * (time.monotonic() - start))
    os.close(reading)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), int(told or 0)]), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presses:
    """Presses one source by one recipe, in processes of their own."""

    process: "subprocess.Popen[str]"
    source: Path
    recipe: Path
    shard_bytes: int

    def press(
        self, out: Path, *, kind: Kind = "any", kill_at: int = -1, resume: bool = False, overwrite: bool = False
    ) -> tuple[int, int]:
        """Return (exit code, calls that were made); the process is killed before the one with the number `kill_at`.

        Milliseconds are in the place of calls where the kind is "time".
        """
        job = {
            "source": str(self.source),
            "recipe": str(self.recipe),
            "out": str(out),
            "kind": kind,
            "at": kill_at,
            "resume": resume,
            "overwrite": overwrite,
            "shard_bytes": self.shard_bytes,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, calls = json.loads(self.process.stdout.readline())
        return code, calls


@contextmanager
def forked_for_runs(source: Path, recipe: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start the process that is forked for every run; it presses once itself, so that all is loaded that is needed."""
    command = (sys.executable, "-c", PROGRAM, str(source), str(recipe))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def same_but_the_report(one: Path, other: Path) -> None:
    """Two artifacts are the same to the byte, but for what says how long it took."""
    files = [{str(path.relative_to(top)): path for path in top.rglob("*") if path.is_file()} for top in (one, other)]
    assert files[0].keys() == files[1].keys()
    differ = {name for name in files[0] if files[0][name].read_bytes() != files[1][name].read_bytes()}
    assert differ <= {"pressd/report.json", "pressd/report.html"}
