"""Writes promise.proto: what the protos declare, without comments and in one file, for `buf breaking` to compare with.

python tests/protos/promise.py           additions; anything that breaks a client is refused
python tests/protos/promise.py --break   break clients on purpose
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROTOS = ROOT / "protos"
PROMISE = ROOT / "tests/protos/promise.proto"
BUF = Path(sys.executable).parent / "buf"


def declared(protos: Path) -> str:
    """All files of pressd.v1 as one."""
    files = [list(_code(path)) for path in sorted((protos / "pressd/v1").glob("*.proto"))]
    imports = {line for lines in files for line in lines if line.startswith("import") and "google/" in line}
    declarations = [line for lines in files for line in lines if not line.startswith(("syntax", "package", "import"))]
    head = ["// Written by promise.py; not read by anything but buf.", 'syntax = "proto3";', "package pressd.v1;"]
    return "\n".join([*head, *sorted(imports), *declarations]) + "\n"


def _code(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        code = line.partition("//")[0].rstrip()
        if code:
            yield code


def breaks(protos: Path, promise: Path) -> list[str]:
    """What in these protos breaks clients of the promise."""
    run = [str(BUF), "breaking", str(protos), "--against", str(promise), "--error-format", "json"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode in (0, 100), done.stderr  # 100: there are findings
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(one["type"] != "COMPILE" for one in found), done.stdout
    return [f"{one.get('path', 'gone')}: {one['message']}" for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down what the protos promise.")
    parser.add_argument("--break", dest="may_break", action="store_true", help="break clients on purpose")
    arguments = parser.parse_args()
    if not arguments.may_break and (problems := breaks(PROTOS, PROMISE)):
        raise SystemExit("\n".join(problems) + "\nthis breaks clients; put it back, or say --break")
    PROMISE.write_text(declared(PROTOS), encoding="utf-8")


if __name__ == "__main__":
    main()
