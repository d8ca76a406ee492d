"""A client made of compiled .proto files alone, in a process that cannot import pressd."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc_tools
import pytest

pytestmark = pytest.mark.system

FOLDER = Path(__file__).parent
PROTOS = FOLDER.parent.parent.parent / "protos"
SITE_PACKAGES = Path(grpc.__file__).parent.parent
TEXT = "the ü of 漢字 and 👩‍🚀 €"


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A folder of generated code and nothing else of ours."""
    files = [str(path) for path in sorted(PROTOS.glob("pressd/v1/*.proto"))]
    includes = [f"-I{PROTOS}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *includes, *outputs, *files], check=True)
    return tmp_path


def test_it_streams_completions_and_reads_refusals(parrot: Any, compiled: Path) -> None:
    program = [sys.executable, "-S", str(FOLDER / "from_protos.py"), parrot.target, TEXT]
    path = os.pathsep.join([str(compiled), str(SITE_PACKAGES)])
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = found.pop("kinds")
    assert kinds == ["accepted", *["delta"] * (len(kinds) - 2), "finished"]
    assert found == {
        "models": ["parrot"],
        "streamed": TEXT,
        "whole": TEXT,
        "code": "INVALID_ARGUMENT",
        "fields": ["sampling.top_p"],
    }
