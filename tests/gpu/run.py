"""Install the bundle beside this Python, without a network, then test and measure on the device.

    python3 tests/gpu/run.py [--device cuda] [--stages tests,kernels] [-- BENCH OPTIONS]          (or: make gpu)

Results go to $OUT where that names a folder, as on a rented machine whose files come back from there, else to
build/gpu-results. `--device cpu` does the same on the CPU, with fewer and smaller runs, to try the way without a GPU.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "gpu-bundle"
SITE = ROOT / "build" / "gpu-site"
STAMP = SITE / "wheels.sha256"
ROOMS = {"runtime": "runtime", "compress": "compress", "server": "server", "client": "server/client"}
# The shape of Llama 3.1 with 8 billion parameters.
EIGHT = (
    "--hidden 4096 --layers 32 --heads 32 --kv-heads 8 --ffn 14336 --vocab 128256 --schemes bf16 fp8 w8a8 w4a16g128 "
    "--batches 1 8 32 128 --contexts 1024 --prompt 2048 --steps 16 --runs 3"
)
SMALL = "--hidden 256 --layers 2 --heads 4 --kv-heads 2 --ffn 512 --vocab 97 --steps 3 --runs 2"


class Refused(Exception):
    """One line for the user."""


def check_device(device: str) -> None:
    """Raise Refused unless this Python has PyTorch and, if asked for, PyTorch a GPU."""
    try:
        import torch
    except ImportError:
        raise Refused(
            f"{sys.executable} has no PyTorch; give make one that has, e.g. PYTHON=.venv/bin/python"
        ) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("PyTorch sees no CUDA device here; GPU_DEVICE=cpu runs the same on the CPU, much smaller")


def install() -> None:
    """Unpack the bundle into build/gpu-site, unless just these wheels are there already."""
    wheels = sorted(BUNDLE.glob("*.whl"))
    if not any(wheel.name.startswith("pressd-") for wheel in wheels):
        raise Refused("build/gpu-bundle holds no wheel of pressd; run `make gpu-bundle` where packages can be fetched")
    digest = hashlib.sha256(b"".join(hashlib.sha256(wheel.read_bytes()).digest() for wheel in wheels)).hexdigest()
    stamp = f"{digest} {sys.version}"
    if STAMP.is_file() and STAMP.read_text() == stamp:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-cache-dir",
        f"--target={SITE}",
    ]
    command = [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode:
        raise Refused(f"pip: {completed.stderr.strip().splitlines()[-1]}")
    STAMP.write_text(stamp)


def check_fresh() -> None:
    """Raise Refused if what is installed is not the source beside it, which may have changed since."""
    for package, folder in ROOMS.items():
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        if folder == "server":
            files = {file for file in files if file.parts[0] != "client"}
        for file in sorted(files):
            installed = SITE / "pressd" / package / file
            if not installed.is_file() or installed.read_bytes() != (ROOT / folder / file).read_bytes():
                raise Refused(f"the bundle is older than {folder}/{file}; run `make gpu-bundle` again")


def describe(device: str) -> dict[str, Any]:
    """Return what ran: device, driver and versions."""
    import torch

    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    for package in ("torch", "triton", "transformers", "numpy", "pydantic", "compressed-tensors", "pressd"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run(name: str, command: list[str], results: Path) -> dict[str, Any]:
    """Run a stage with what was installed in front; show its output and keep it in <name>.log."""
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    with (
        (results / f"{name}.log").open("w") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    return {"exit_code": process.returncode, "seconds": round(time.monotonic() - began, 1)}


def stages(device: str, results: Path, bench: list[str]) -> dict[str, list[str]]:
    # Warnings of libraries in versions that we did not choose must not fail a run on a machine that is rented.
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    scripts = {
        name: [sys.executable, f"tests/bench/gpu_{name}.py", f"--out={results}"]
        for name in ("kernels", "gptq", "peers")
    }
    measure = [sys.executable, "tests/bench/gpu.py", f"--device={device}", f"--out={results}"]
    if device == "cpu":
        return {
            "tests": [*pytest, "tests/gpu"],
            "bench": [*measure, "--model=examples/pylm", *(bench or shlex.split(SMALL))],
        }
    return {
        "tests": [*pytest, "-m", "gpu", "tests"],
        "triton": [*pytest, "-m", "", "tests/triton"],
        "kernels": scripts["kernels"],
        "bench": [*measure, *(bench or shlex.split(EIGHT))],
        "gptq": scripts["gptq"],
        "peers": scripts["peers"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", help="of tests, triton, kernels, bench, gptq and peers, those to run, by commas")
    parser.add_argument("bench", nargs="*", metavar="BENCH OPTION", help="for tests/bench/gpu.py, after --")
    arguments = parser.parse_args()
    try:
        check_device(arguments.device)
        install()
        check_fresh()
    except Refused as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(SITE))
    given = os.environ.get("OUT")
    results = Path(given) if given else ROOT / "build" / "gpu-results"
    results.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = describe(arguments.device)
    print(json.dumps(report, indent=1))
    report["stages"] = {
        name: run(name, command, results)
        for name, command in stages(arguments.device, results, arguments.bench).items()
        if not arguments.stages or name in arguments.stages.split(",")
    }
    (results / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, stage in report["stages"].items() if stage["exit_code"]]
    print(f"\ngpu: {', '.join(f'{name} failed' for name in failed) or 'all passed'}; results in {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
