"""A press that is killed, in a process of its own: what is left claims nothing, and the next one succeeds."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pressd.compress import compress
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.reader import Checkpoint

pytestmark = pytest.mark.system

# Says each block as it is done, and then waits to be killed: the moment is exact, however fast the machine.
PROGRAM = """
import sys
from pressd.compress import compress
def wait(block):
    print(block.block, flush=True)
    sys.stdin.readline()
compress(sys.argv[1], sys.argv[2], sys.argv[3], progress=wait)
print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("last", ["embed", "layers.1", "head"])
def test_killed_in_the_middle(tiny_llama: Path, number: signal.Signals, last: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, str(tiny_llama), "w4a16g32", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.decode().strip() == last:
                break
            process.stdin.write(b"\n")
            process.stdin.flush()
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    assert not out.exists()
    left = list(tmp_path.iterdir())
    if number == signal.SIGINT:
        assert left == []
    else:
        (partial,) = left
        with pytest.raises(ArtifactError, match=r"has no config\.json|is unfinished"):
            Checkpoint.open(partial)
        assert not (partial / "pressd/manifest.json").exists()
    manifest = compress(tiny_llama, "w4a16g32", out)
    assert Checkpoint.open(out).artifact_id == manifest.id
